"use strict";
// Beside `rloop report --live`: take over what has changed, without losing the reader's place.
const EVERY_MS = 4000;
let version = null;

async function refresh() {
  const says = document.getElementById("live");
  try {
    const asked = await fetch("version", {cache: "no-store"});
    const {version: now, state} = await asked.json();
    says.textContent = `● ${state}, ${new Date().toLocaleTimeString()}`;
    if (version !== null && now !== version) await takeOver(await (await fetch("page", {cache: "no-store"})).text());
    version = now;
  } catch {
    says.textContent = "○ rloop report --live has ended";
  }
  setTimeout(refresh, EVERY_MS);
}

async function takeOver(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const id of ["figures", "held"]) document.getElementById(id).textContent = fresh.getElementById(id).textContent;
  const before = new Map([...document.querySelectorAll("figure")].map(figure => [figure.querySelector("h3").textContent, figure]));
  for (const figure of fresh.querySelectorAll("figure")) {  // a drawn plot keeps its zoom
    const drawn = before.get(figure.querySelector("h3").textContent)?.querySelector(".plot");
    if (!drawn) continue;
    drawn.dataset.figure = figure.querySelector(".plot").dataset.figure;
    figure.querySelector(".plot").replaceWith(drawn);
  }
  for (const id of ["numbers", "record"]) document.getElementById(id).replaceWith(document.adoptNode(fresh.getElementById(id)));
  document.querySelector("nav").replaceWith(document.adoptNode(fresh.querySelector("nav")));
  draw();
  showEventKinds();
  await showBrowser();
}

refresh();
