"use strict";
// Figures in the colours of the page's theme.
const read = id => JSON.parse(document.getElementById(id).textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themedLayout(layout, traces) {
  const axis = given => ({gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--soft"),
    automargin: true, ...given, title: {...given.title, standoff: 8}});
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 56, r: 12, t: 8, b: 44},
    font: {color: colour("--ink"), family: "system-ui, sans-serif", size: 13}, hovermode: "closest", uirevision: "kept",
    hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--ink")}},
    showlegend: traces.length > 1,
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent")},
    ...layout, legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", maxheight: 9999, ...layout.legend},
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
  };
}

function themedTrace(trace) {
  if (!Array.isArray(trace.colorscale)) return trace;  // a diverging scale: its middle is the page's
  const scale = trace.colorscale.map(([place, hue]) => [place, place === 0.5 ? colour("--middle") : hue]);
  return {...trace, colorscale: scale};
}

// So that a legend of many rows, as of many runs, leaves the figure its room. It has the width between the margins.
function height(traces, width) {
  const shown = traces.filter(trace => trace.name && trace.showlegend !== false);
  const longest = Math.max(0, ...shown.map(trace => trace.name.length));
  const rows = Math.ceil(shown.length / Math.max(1, Math.floor((width - 80) / (48 + 7 * longest))));
  return 330 + 20 * Math.max(0, rows - 2);
}

function draw() {
  const figures = read("figures");
  const printed = matchMedia("print").matches;
  for (const plot of document.querySelectorAll(".plot")) {
    const {data, layout} = figures[plot.dataset.figure];
    const name = plot.closest("figure").querySelector("h3").textContent.replace(/[^\w]+/g, "_");
    // A page that is about to be printed has no size yet; its columns have one.
    const size = {width: printed ? 314 : plot.clientWidth};
    size.height = height(data, size.width);
    plot.style.height = `${size.height}px`;
    Plotly.react(plot, data.map(themedTrace), {...themedLayout(layout, data), ...size}, {displaylogo: false,
      modeBarButtons: [["toImage"]], toImageButtonOptions: {format: "svg", filename: name}});
  }
}

const themes = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = `Colours: ${theme}`;
  button.ariaLabel = `Colours: ${theme}`;
  button.dataset.theme = theme;
  try { localStorage.setItem("rloop-theme", theme); } catch { /* a browser that keeps nothing */ }
  draw();
}
document.getElementById("theme").addEventListener("click", event =>
  setTheme(themes[(themes.indexOf(event.currentTarget.dataset.theme) + 1) % themes.length]));
let resized;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 100); });
for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", draw);

function showEventKinds() {
  const rows = [...document.querySelectorAll("tr[data-kind]")];
  const group = document.getElementById("event-kinds");
  group.replaceChildren(...[...new Set(rows.map(row => row.dataset.kind))].map(kind => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${kind} (${rows.filter(row => row.dataset.kind === kind).length})`;
    button.ariaPressed = "true";
    button.addEventListener("click", () => {
      button.ariaPressed = String(button.ariaPressed !== "true");
      for (const row of rows) if (row.dataset.kind === kind) row.hidden = button.ariaPressed !== "true";
    });
    return button;
  }));
}

let kept = "auto";
try { kept = localStorage.getItem("rloop-theme") || "auto"; } catch { /* as above */ }
setTheme(themes.includes(kept) ? kept : "auto");
showEventKinds();
