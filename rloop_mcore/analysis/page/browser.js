"use strict";
// The trajectory browser: problems on the left, two responses to one of them side by side on the right.
const MARK = "\ue000";
const byId = id => document.getElementById(id);
const library = {runs: [], formulas: []};
const chosen = {run: 0, problem: null, panes: [{visit: null, at: 0}, {visit: null, at: 0}]};

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

async function unpack() {
  const packed = byId("held").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// Text with formulas drawn; what was searched for is marked.
function prose(text, query) {
  const parts = text.split(MARK).map((part, place) => {
    if (place % 2 === 0) return marked(part, query);
    const [latex, mathml] = library.formulas[Number(part)];
    if (!mathml) return [element("code", {textContent: latex})];
    const holder = element("span", {title: latex});
    holder.innerHTML = mathml;  // made and cleaned by analysis/maths.py
    return [holder];
  });
  return parts.flat();
}

function marked(text, query) {
  if (!query) return [text];
  const found = [], lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, from)) {
    found.push(text.slice(from, at), element("mark", {textContent: text.slice(at, at + query.length)}));
    from = at + query.length;
  }
  return [...found, text.slice(from)];
}

const plain = text => text.split(MARK).map((part, i) => i % 2 ? library.formulas[Number(part)][0] : part).join("");

function filters() {
  const number = id => byId(id).value === "" ? null : Number(byId(id).value);
  return {text: byId("f-text").value.trim().toLowerCase(), kind: byId("f-kind").value, state: byId("f-state").value,
    step: byId("f-step").value, verdict: byId("f-verdict").value, reward: number("f-reward"), low: number("f-low"),
    high: number("f-high"), sort: byId("f-sort").value};
}

function inState(problem, state) {
  switch (state) {
    case "hard": return problem.hard.length > 0;
    case "rft": return problem.rft.length > 0;
    case "never": return problem.right === 0;
    case "solved": return problem.right > 0;
    case "lost": return problem.lost;
  }
  return true;
}

const ofResponses = wanted =>
  Boolean(wanted.step || wanted.verdict || wanted.reward !== null || wanted.low !== null || wanted.high !== null);

function fits(response, wanted) {
  return (!wanted.step || String(response.visit) === wanted.step)
    && (!wanted.verdict || response.correct === (wanted.verdict === "right"))
    && (wanted.reward === null || response.reward >= wanted.reward)
    && (wanted.low === null || response.tokens >= wanted.low) && (wanted.high === null || response.tokens <= wanted.high);
}

function matching() {
  const run = library.runs[chosen.run], wanted = filters();
  const has = text => text !== undefined && plain(text).toLowerCase().includes(wanted.text);
  const responses = run.responses.filter(response => fits(response, wanted));
  const withText = new Set(wanted.text ? responses.filter(each => has(each.text)).map(each => each.problem) : []);
  const withAny = new Set(responses.map(each => each.problem));
  const problems = run.problems.map((problem, number) => ({...problem, number})).filter(problem =>
    (!wanted.kind || problem.kind === wanted.kind) && inState(problem, wanted.state)
    && (!wanted.text || problem.id.toLowerCase().includes(wanted.text) || has(problem.prompt) || withText.has(problem.number))
    && (!ofResponses(wanted) || withAny.has(problem.number)));
  const last = Number.MAX_SAFE_INTEGER;
  const orders = {id: (a, b) => a.id.localeCompare(b.id, "en", {numeric: true}), rate: (a, b) => a.right / a.asked - b.right / b.asked,
    first: (a, b) => (a.first ?? last) - (b.first ?? last)};
  const shown = problem => problem.prompt === undefined ? 1 : 0;  // those with responses come first
  return {problems: problems.sort((a, b) => shown(a) - shown(b) || orders[wanted.sort](a, b)), responses, wanted};
}

const LISTED = 400;

function showProblems() {
  const {problems, responses} = matching();
  const numbers = new Set(problems.map(problem => problem.number));
  const count = responses.filter(response => numbers.has(response.problem)).length;
  byId("f-count").textContent = `${problems.length} problems, ${count} responses`
    + (problems.length > LISTED ? `; the first ${LISTED} are listed` : "");
  if (!numbers.has(chosen.problem)) choose(problems.length ? problems[0].number : null, false);
  byId("problems").replaceChildren(...problems.slice(0, LISTED).map(problem => {
    const rate = problem.right / problem.asked;
    const item = element("li", {id: `problem-${problem.number}`},
      element("div", {className: "name"}, element("span", {textContent: problem.id}),
        element("span", {textContent: `${(100 * rate).toFixed(rate < 0.1 ? 1 : 0)} %`})),
      element("div", {className: "bar"}, Object.assign(element("span"), {style: `width: ${100 * rate}%`})));
    item.role = "option";
    item.ariaSelected = String(problem.number === chosen.problem);
    item.dataset.number = problem.number;
    item.addEventListener("click", () => { choose(problem.number); showProblems(); });
    return item;
  }));
  byId("problems").setAttribute("aria-activedescendant", chosen.problem === null ? "" : `problem-${chosen.problem}`);
  showProblem();
}

function choose(number, reset = true) {
  if (number === chosen.problem && !reset) return;
  chosen.problem = number;
  const visits = number === null ? [] : visitsOf(number);
  chosen.panes = [{visit: visits[0] ?? null, at: 0}, {visit: visits[visits.length - 1] ?? null, at: 0}];
  if (visits.length === 1) chosen.panes[1].at = 1;
}

const responsesTo = number => library.runs[chosen.run].responses.filter(response => response.problem === number);

function visitsOf(number) {
  const wanted = filters();
  const fitting = responsesTo(number).filter(response => fits(response, wanted));
  return [...new Set(fitting.map(response => response.visit))].sort((a, b) => a - b);
}

function badges(problem) {
  const made = [];
  const add = (kind, text) => made.push(element("span", {className: `badge ${kind}`, textContent: text}));
  add("", problem.kind === "train" ? "training" : "validation");
  add(problem.right ? "right" : "", `${problem.right} of ${problem.asked} correct`);
  if (problem.hard.length) add("hard", `hard in iteration ${problem.hard.join(", ")}`);
  if (problem.rft.length) add("rft", `RFT of iteration ${problem.rft.join(", ")}`);
  if (problem.first !== null) add("", `first solved at RL step ${problem.first}`);
  if (problem.lost) add("lost", "not solved at the last visit");
  return element("div", {className: "badges"}, ...made);
}

function visitBars(problem) {
  const run = library.runs[chosen.run];
  const made = element("div", {className: "history", role: "group"});
  made.ariaLabel = "Success rate visit by visit";
  for (const [visit, right, asked] of problem.history ?? []) {
    const label = `${run.visits[visit].label}: ${right} of ${asked} correct`;
    const bar = element("button", {type: "button", title: label}, Object.assign(element("span"), {style: `height: ${100 * right / asked}%`}));
    bar.ariaLabel = label;
    bar.addEventListener("click", () => {
      const visits = visitsOf(chosen.problem);
      if (!visits.length) return;
      const step = run.visits[visit].step;
      const near = visits.reduce((a, b) => Math.abs(run.visits[b].step - step) < Math.abs(run.visits[a].step - step) ? b : a);
      chosen.panes[1] = {visit: near, at: 0};
      showProblem();
    });
    made.append(bar);
  }
  return made;
}

// A text that the keyboard scrolls.
function scrolled(kind, label, text, query) {
  return element("div", {className: `prose ${kind}`, tabIndex: 0, role: "region", ariaLabel: label}, ...prose(text, query));
}

function showProblem() {
  const place = byId("problem");
  const controls = () => [...place.querySelectorAll("button, select, [tabindex]")];
  const focused = controls().indexOf(document.activeElement);
  if (chosen.problem === null) return place.replaceChildren(element("p", {textContent: "No problem fits the filters."}));
  const problem = library.runs[chosen.run].problems[chosen.problem], query = filters().text;
  const parts = [element("h3", {textContent: problem.id}), badges(problem), visitBars(problem)];
  if (problem.prompt) {
    parts.push(scrolled("prompt", "Prompt", problem.prompt, query));
  }
  if (visitsOf(chosen.problem).length) {
    parts.push(element("div", {className: "pair"}, ...chosen.panes.map((pane, side) => showPane(pane, side, query))));
  } else {
    parts.push(element("p", {textContent: "No response to it is held in this page, or none fits the filters: rloop cache RUN --problem ID --show N has all."}));
  }
  place.replaceChildren(...parts);
  if (focused >= 0) controls()[focused]?.focus({preventScroll: true});  // which was another element until now
}

function showPane(pane, side, query) {
  const run = library.runs[chosen.run], wanted = filters();
  const visits = visitsOf(chosen.problem);
  if (!visits.includes(pane.visit)) pane.visit = visits[side ? visits.length - 1 : 0];
  const here = responsesTo(chosen.problem).filter(each => each.visit === pane.visit && fits(each, wanted));
  pane.at = Math.min(pane.at, here.length - 1);
  const response = here[pane.at];
  const select = element("select", {}, ...visits.map(visit =>
    element("option", {value: visit, textContent: run.visits[visit].label, selected: visit === pane.visit})));
  select.ariaLabel = side ? "Step on the right" : "Step on the left";
  select.addEventListener("change", () => { pane.visit = Number(select.value); pane.at = 0; showProblem(); });
  const next = element("button", {type: "button", textContent: `${pane.at + 1} of ${here.length} ›`});
  next.ariaLabel = "Next response of this step";
  next.addEventListener("click", () => { pane.at = (pane.at + 1) % here.length; showProblem(); });
  const tags = element("div", {className: "badges"},
    element("span", {className: `badge ${response.correct ? "right" : "wrong"}`, textContent: response.reason.replaceAll("_", " ")}),
    element("span", {className: "badge", textContent: `reward ${response.reward}`}),
    element("span", {className: "badge", textContent: `${response.tokens} tokens${response.finish === "length" ? ", cut off" : ""}`}),
    element("span", {className: "badge", textContent: `sample ${response.sample}`}));
  if (response.rft) tags.append(element("span", {className: "badge rft", textContent: `RFT ${response.rft} was trained on it`}));
  const text = scrolled("response", side ? "Response on the right" : "Response on the left", response.text, query);
  return element("div", {className: "pane"}, element("div", {className: "filters"}, select, next), tags, text);
}

function fillChoices() {
  byId("f-run").replaceChildren(...library.runs.map((run, i) => element("option", {value: i, textContent: run.run})));
  byId("f-run").value = chosen.run;
  byId("f-run").parentElement.hidden = library.runs.length < 2;
  const visits = library.runs[chosen.run].visits;
  const groups = [["train", "training"], ["validation", "validation"]].map(([kind, label]) =>
    element("optgroup", {label}, ...visits.flatMap((visit, i) =>
      visit.kind === kind ? [element("option", {value: i, textContent: visit.label})] : [])));
  byId("f-step").replaceChildren(element("option", {value: "", textContent: "any"}), ...groups);
  const run = library.runs[chosen.run];
  const count = number => number.toLocaleString("en");
  byId("shown").textContent = `${count(run.trajectories)} responses were sampled in training. Success rates count all of them, and all to `
    + `validation problems; this page holds the texts of ${count(run.responses.length)}.`;
}

function moveChoice(event) {
  const items = [...byId("problems").children];
  const at = items.findIndex(item => Number(item.dataset.number) === chosen.problem);
  const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1}[event.key];
  if (to === undefined || !items[to]) return;
  event.preventDefault();
  choose(Number(items[to].dataset.number));
  showProblems();
  byId(`problem-${chosen.problem}`).scrollIntoView({block: "nearest"});
}

async function showBrowser() {
  const held = await unpack();
  library.runs = held.runs.filter(run => run.problems.length);
  library.formulas = held.formulas;
  byId("browser").hidden = !library.runs.length;
  if (!library.runs.length) return void (byId("shown").textContent = "No trajectories yet.");
  chosen.run = Math.min(chosen.run, library.runs.length - 1);
  const step = byId("f-step").value;
  fillChoices();
  byId("f-step").value = step;
  showProblems();
}

for (const id of ["f-text", "f-reward", "f-low", "f-high"]) byId(id).addEventListener("input", showProblems);
for (const id of ["f-kind", "f-state", "f-step", "f-verdict", "f-sort"]) byId(id).addEventListener("change", showProblems);
byId("f-run").addEventListener("change", () => {
  chosen.run = Number(byId("f-run").value);
  chosen.problem = null;
  fillChoices();
  showProblems();
});
byId("f-clear").addEventListener("click", () => { document.querySelector("#browser form").reset(); byId("f-run").value = chosen.run; showProblems(); });
byId("problems").addEventListener("keydown", moveChoice);
showBrowser();
