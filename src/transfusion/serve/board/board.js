// The page: which runs are chosen, what is asked of the server and when, and where it is shown.

import { AXES, amount, Chart, duration, element, figure, key, runClass, short, whole } from "/page/chart.js";

const LIVE_SECONDS = 2;
const IDLE_SECONDS = 15;
const CHOSEN_AT_FIRST = 5;
// With more runs than these, a field filters the list.
const LIST_WITHOUT_FILTER = 8;
const IMAGES_KEPT = 200;
const LOG_LINES = 2000;
const BUCKETS = "image_loss_by_timestep";
const ELAPSED = "elapsed";
// In the order in which they are shown: title, unit, and what differs from other curves.
const METRICS = {
  loss: { title: "Total loss", unit: "as weighted" },
  text_loss: { title: "Text loss", unit: "nats a token" },
  image_loss: { title: "Image loss", unit: "" },
  gradient_norm: { title: "Gradient norm", unit: "" },
  learning_rate: { title: "Learning rate", unit: "", isExact: true },
  tokens_per_second: { title: "Tokens a second", unit: "" },
  memory_gib: { title: "Peak memory", unit: "GiB" },
  data_wait: { title: "Wait for data", unit: "share of the time", isShare: true },
  mfu: { title: "Model FLOPs utilisation", unit: "", isShare: true },
};
const LOSSES = ["loss", "text_loss", "image_loss"];
const UNSHOWN = new Set(["tokens", "images", "skipped", "faults", "roll_backs", "hfu", "mfu_palm", "gemm_share", ELAPSED, BUCKETS]);
const NO_GRIDS = "No sample grid yet. Name some sample_grid.prompts in the configuration.";
const WRONG_TOKEN = "This is not the token. Give the one that the server was started with.";
const TOKEN_KEY = "transfusion-board-token";

const $ = (id) => document.getElementById(id);

// What a shared address tells. chosen: null until somebody chooses. step: null is the newest.
const view = { chosen: null, axis: "step", smoothing: 5, logarithmic: false, step: null, tail: "", buckets: "" };
// Of the runs, by name: what the list tells, what was read of their curves, their grids.
let runs = new Map();
const curves = new Map();
const grids = new Map();
const images = new Map();
const charts = new Map();
const rows = new Map();
const sampleRows = new Map();
const log = { run: "", cursor: "" };
let timer = 0;
let frame = 0;
let serverNow = 0;
let comparedKey = "";

// ---- The server ----

class TokenNeeded extends Error {}

async function ask(path, query = []) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(`${path}?${new URLSearchParams(query)}`, { headers });
  if (answer.status === 401) throw new TokenNeeded();
  return answer;
}

/** What the server tells, null where it has no such run any more. */
async function get(path, query) {
  const answer = await ask(path, query);
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function refresh() {
  clearTimeout(timer);
  try {
    const listed = await get("/api/runs");
    takeList(listed);
    showList(listed);
    show();
    await Promise.all([...chosen().map(readCurves), ...chosen().map(readGrids), readLog(), compare()]);
    show();
    tellLive();
    $("token").hidden = true;
  } catch (error) {
    if (error instanceof TokenNeeded) askForToken();
    else tellTrouble(error);
  }
  schedule();
}

/** Never while nobody looks, and rarely where nothing is under way. */
function schedule() {
  clearTimeout(timer);
  if (document.hidden || !$("token").hidden) return;
  timer = setTimeout(refresh, 1000 * (isLive() ? LIVE_SECONDS : IDLE_SECONDS));
}

function isLive() {
  return [...runs.values()].some((run) => run.state === "running");
}

function askForToken() {
  $("wrong").textContent = sessionStorage.getItem(TOKEN_KEY) ? WRONG_TOKEN : "";
  for (const id of ["board", "empty", "unchosen", "side"]) $(id).hidden = true;
  $("token").hidden = false;
  $("secret").focus();
}

function tellLive() {
  const running = [...runs.values()].filter((run) => run.state === "running").length;
  const words = running ? `Live, ${running === 1 ? "one run" : `${running} runs`} under way` : "No run is under way";
  say($("live"), words, running ? "live on" : "live");
}

function tellTrouble(error) {
  const isAway = error instanceof TypeError;
  const words = isAway ? "The server does not answer. Start transfusion board again." : "The server failed. It is asked again.";
  say($("live"), words, "live off");
}

/** Only when it changes, since a screen reader says it again each time. */
function say(place, words, className) {
  if (place.textContent !== words) place.textContent = words;
  place.className = className;
}

// ---- The view, in the address ----

function readHash() {
  const told = new URLSearchParams(location.hash.slice(1));
  view.chosen = told.has("run") ? told.getAll("run").filter(Boolean) : null;
  view.axis = told.get("x") in AXES ? told.get("x") : "step";
  view.smoothing = within(told.get("smooth") ?? 5, 0, 20);
  view.logarithmic = told.get("log") === "1";
  view.step = told.has("step") ? within(told.get("step"), 0, Number.MAX_SAFE_INTEGER) : null;
  view.tail = told.get("tail") ?? "";
  view.buckets = told.get("buckets") ?? "";
}

function within(text, low, high) {
  const value = Math.round(Number(text));
  return Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : low;
}

function writeHash() {
  const told = new URLSearchParams();
  // An empty name tells that none is chosen.
  for (const name of view.chosen?.length === 0 ? [""] : (view.chosen ?? [])) told.append("run", name);
  if (view.axis !== "step") told.set("x", view.axis);
  if (view.smoothing !== 5) told.set("smooth", view.smoothing);
  if (view.logarithmic) told.set("log", "1");
  if (view.step !== null) told.set("step", view.step);
  if (view.tail) told.set("tail", view.tail);
  if (view.buckets) told.set("buckets", view.buckets);
  const text = told.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname);
}

/** Names of the runs that are drawn, in the order of the list. */
function chosen() {
  const names = view.chosen ?? atFirst();
  return [...runs.keys()].filter((name) => names.includes(name));
}

function atFirst() {
  const newest = [...runs.values()].sort((a, b) => b.written - a.written);
  const running = newest.filter((run) => run.state === "running");
  return [...running, ...newest.filter((run) => run.state !== "running")].slice(0, CHOSEN_AT_FIRST).map((run) => run.name);
}

async function choose(names) {
  view.chosen = names;
  writeHash();
  show();
  await refresh();
}

// ---- The list ----

function takeList(listed) {
  serverNow = listed.now;
  // Seed 10 comes behind seed 9.
  for (const { name, slot } of listed.runs) if (runs.get(name)?.slot !== slot) forgetRows(name);
  const sorted = listed.runs.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  runs = new Map(sorted.map((run) => [run.name, run]));
  for (const held of [curves, grids]) {
    for (const name of held.keys()) if (!runs.has(name)) held.delete(name);
  }
}

/** They have the colour that the run had before the server was started again. */
function forgetRows(name) {
  rows.delete(name);
  sampleRows.delete(name);
}

function showList(listed) {
  const base = listed.folder.replace(/\/+$/, "").split("/").at(-1) || listed.folder;
  $("folder").textContent = base;
  document.title = `${base} · Transfusion`;
  $("watched").textContent = listed.folder;
  const missing = (view.chosen ?? []).filter((name) => !runs.has(name));
  tellNotes($("notes"), [...listed.notes, ...missing.map((name) => `The run ${name} is no longer here.`)]);
  $("side").hidden = runs.size === 0;
  $("filter").hidden = runs.size <= LIST_WITHOUT_FILTER;
  const wanted = [...runs.values()].map(rowOf);
  const list = $("runs");
  if (wanted.length !== list.children.length || wanted.some((row, place) => list.children[place] !== row)) {
    list.replaceChildren(...wanted);
  }
  for (const name of rows.keys()) if (!runs.has(name)) rows.delete(name);
  showChoice();
}

function showChoice() {
  const names = chosen();
  $("count").textContent = `${names.length} of ${runs.size} ${runs.size === 1 ? "run" : "runs"}`;
  const searched = $("filter").value.trim().toLowerCase();
  for (const [name, row] of rows) {
    row.querySelector("input").checked = names.includes(name);
    row.hidden = !name.toLowerCase().includes(searched);
  }
}

/** The row of a run: made once, so that the focus stays where it is. */
function rowOf(run) {
  if (!rows.has(run.name)) rows.set(run.name, newRow(run));
  const row = rows.get(run.name);
  row.querySelector(".state").className = run.state === "running" ? "state on" : "state";
  const bar = row.querySelector("progress");
  bar.hidden = run.state !== "running" || !run.steps;
  Object.assign(bar, { max: run.steps ?? 1, value: run.step ?? 0 });
  const words = [progress(run), run.losses.loss === undefined ? "" : `loss ${figure(run.losses.loss)}`, ago(run)];
  row.querySelector("small").textContent = words.filter(Boolean).join(" · ");
  return row;
}

function newRow(run) {
  const box = element("input", { type: "checkbox", class: runClass(run.slot) });
  box.addEventListener("change", () => {
    const names = chosen().filter((name) => name !== run.name);
    choose(box.checked ? [...names, run.name] : names);
  });
  const state = element("i", { class: "state", "aria-hidden": "true" });
  const name = element("span", { class: "name" }, run.name);
  const bar = element("progress", { "aria-hidden": "true" });
  return element("li", {}, element("label", {}, box, name, state, key(run.slot), element("small"), bar));
}

function progress(run) {
  if (run.step === null) return "no step yet";
  if (run.step === run.steps) return `${whole(run.step)} steps`;
  return run.steps ? `${whole(run.step)} of ${whole(run.steps)}` : `step ${whole(run.step)}`;
}

function ago(run) {
  const seconds = serverNow - run.written;
  if (run.state === "running" && seconds < 90) return "running";
  const units = [[86400 * 2, 86400, "d"], [3600, 3600, "h"], [90, 60, "min"]];
  const [, unit, name] = units.find(([from]) => seconds >= from) ?? [];
  return unit ? `${Math.round(seconds / unit)} ${name} ago` : "just now";
}

function tellNotes(list, notes) {
  const told = [...list.children].map((each) => each.textContent);
  if (told.join("\n") === notes.join("\n")) return;
  list.replaceChildren(...notes.map((note) => element("li", {}, note)));
}

// ---- What the chosen runs did ----

function show() {
  frame = 0;
  const names = chosen();
  $("empty").hidden = runs.size > 0;
  $("unchosen").hidden = runs.size === 0 || names.length > 0;
  $("board").hidden = names.length === 0;
  showChoice();
  if (!names.length) return;
  showFacts(names);
  showCurves(names);
  showSamples(names);
  showTail(names);
}

function showFacts(names) {
  const losses = new Set(names.flatMap((name) => Object.keys(runs.get(name).losses)));
  const others = [...losses].filter((name) => !LOSSES.includes(name) && !isDots(name, losses));
  const shown = [...LOSSES.filter((name) => losses.has(name)), ...others];
  const titles = ["Step", ...shown.map(title), "Tokens", "Tokens a second", "State"];
  const head = titles.map((text) => element("th", { scope: "col", class: "number" }, text));
  $("facts").replaceChildren(
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Run"), ...head)),
    element("tbody", {}, ...names.map((name) => factsOf(runs.get(name), shown))),
  );
  tellNotes($("troubles"), names.flatMap(troubles));
}

function factsOf(run, losses) {
  const left = run.seconds_left === null ? "running" : `${duration(run.seconds_left)} left`;
  const cells = [
    [progress(run)],
    ...losses.map((name) => lossOf(run, name)),
    [amount(run.tokens)],
    [figure(run.tokens_per_second)],
    [run.state === "running" ? left : `ended ${ago(run)}`],
  ];
  const name = element("th", { scope: "row" }, key(run.slot), run.name);
  return element("tr", {}, name, ...cells.map((words) => element("td", { class: "number" }, ...words)));
}

function lossOf(run, name) {
  const validation = run.losses[`validation_${name}`];
  const below = validation === undefined ? [] : [element("small", {}, `validation ${figure(validation)}`)];
  return [figure(run.losses[name]), ...below];
}

function troubles(name) {
  const held = curves.get(name);
  const found = [...runs.get(name).notes];
  if (held?.note) found.push(`Its curves cannot be read: ${held.note}.`);
  if (held?.broken) found.push(`${count(held.broken, "line")} of metrics.jsonl could not be read, and no curve shows them.`);
  if (held?.notFinite) found.push(`${count(held.notFinite, "step")} had a loss that was no number.`);
  return found.map((words) => (chosen().length > 1 ? `${name}: ${words}` : words));
}

function count(number, noun) {
  return `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function title(name) {
  if (METRICS[name]) return METRICS[name].title;
  const words = name.replaceAll("_", " ").replaceAll(".", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

// ---- Curves ----

async function readCurves(name) {
  const run = runs.get(name);
  const held = curves.get(name) ?? { cursor: "", asked: new Set(), points: new Map(), names: [], written: -1 };
  const wanted = wantedOf(name, held);
  const isNew = wanted.some((each) => !held.asked.has(each));
  if (!isNew && held.written === run.written && run.state !== "running") return;
  const cursor = isNew ? "" : held.cursor;
  const query = [["run", name], ["cursor", cursor], ...wanted.map((each) => ["name", each])];
  const told = await get("/api/series", query);
  if (!told) return;
  merge(held, told);
  Object.assign(held, { asked: new Set(wanted), written: run.written });
  curves.set(name, held);
  if (wantedOf(name, held).some((each) => !held.asked.has(each))) await readCurves(name);
  showSoon();
}

/** Once for all that has arrived until the next frame. */
function showSoon() {
  frame ||= requestAnimationFrame(show);
}

function wantedOf(name, held) {
  const names = new Set([...Object.keys(METRICS), ...LOSSES.map((loss) => `validation_${loss}`), "tokens", ELAPSED]);
  for (const each of held.names) if (!UNSHOWN.has(each)) names.add(each);
  if (name === bucketRun()) names.add(BUCKETS);
  return [...names];
}

/** Points from the answer's first step on take the place of those that are known. */
function merge(held, told) {
  if (told.first === 0) held.points.clear();
  for (const [name, points] of Object.entries(told.points)) {
    const kept = (held.points.get(name) ?? []).filter(([step]) => step < told.first);
    held.points.set(name, kept.concat(points));
  }
  Object.assign(held, {
    cursor: told.cursor, names: told.names, note: told.note, broken: told.broken, notFinite: told.not_finite,
  });
}

function showCurves(names) {
  const known = new Set(names.flatMap((name) => [...(curves.get(name)?.points.keys() ?? [])]));
  const others = [...known].filter((name) => !METRICS[name] && !UNSHOWN.has(name) && !name.includes("."));
  const shown = [...Object.keys(METRICS), ...others].filter((name) => known.has(name) && !isDots(name, known));
  const drawn = shown.filter((name) => names.some((run) => curves.get(run)?.points.get(name)?.length));
  const isRead = names.every((name) => curves.has(name));
  $("reading").textContent = drawn.length ? "" : isRead ? "No step has been logged yet." : "Reading the curves.";
  place($("panels"), drawn.map((name) => chartOf(name).figure));
  const domain = domainOf(names);
  for (const name of drawn) drawPanel(name, names, domain);
  showBuckets(names);
}

/** Whether a metric stands as dots in the panel of another. */
function isDots(name, known) {
  return name.startsWith("validation_") && known.has(name.slice("validation_".length));
}

/** Put these elements there, and touch none that stands there already. */
function place(parent, elements) {
  const same = parent.children.length === elements.length && elements.every((each, at) => parent.children[at] === each);
  if (!same) parent.replaceChildren(...elements);
}

function chartOf(name) {
  if (!charts.has(name)) charts.set(name, new Chart(title(name), METRICS[name]?.unit ?? "", moved, name !== BUCKETS));
  return charts.get(name);
}

function drawPanel(name, names, domain) {
  const metric = METRICS[name] ?? {};
  const lines = names.map((run) => ({
    name: run,
    slot: runs.get(run).slot,
    className: runClass(runs.get(run).slot),
    points: pointsOf(run, name),
    dots: pointsOf(run, `validation_${name}`),
  }));
  const chart = chartOf(name);
  const dotted = lines.some((line) => line.dots.length) ? "dots: validation" : "";
  chart.unit.textContent = [metric.unit, dotted].filter(Boolean).join(", ");
  chart.update(lines.filter((line) => line.points.length), viewOf(domain, metric));
}

function viewOf(domain, metric) {
  return {
    axis: view.axis,
    domain,
    smoothing: metric.isExact ? 0 : view.smoothing / 100,
    isExact: metric.isExact,
    logarithmic: view.logarithmic,
    format: metric.isShare ? (value) => `${(value * 100).toFixed(1)} %` : figure,
    tick: metric.isShare ? (value) => `${short(value * 100)} %` : short,
  };
}

/** The points of a metric along the axis that is shown. */
function pointsOf(run, name) {
  const points = curves.get(run)?.points.get(name) ?? [];
  const along = alongOf(run);
  return points.map(([step, y, low, high]) => ({ x: along(step), y, low, high })).filter((point) => point.x !== null);
}

/** From a step to its place on the axis, between the steps that are known. */
function alongOf(run) {
  if (view.axis === "step") return (step) => step;
  const known = curves.get(run)?.points.get(view.axis) ?? [];
  let place = 0;
  return (step) => {
    if (!known.length) return null;
    if (known[place][0] > step) place = 0;
    while (place + 1 < known.length && known[place + 1][0] <= step) place += 1;
    const [[before, from], after] = [known[place], known[place + 1]];
    return after ? from + ((step - before) / (after[0] - before)) * (after[1] - from) : from;
  };
}

/** From the first to the last place of all chosen runs, so that all panels agree. */
function domainOf(names) {
  const ends = names.flatMap((run) => {
    const held = curves.get(run)?.points ?? new Map();
    const along = alongOf(run);
    return [...held.values()].filter((points) => points.length).flatMap((points) => [along(points[0][0]), along(points.at(-1)[0])]);
  });
  const places = ends.filter((place) => place !== null);
  if (!places.length) return [0, 1];
  const [first, last] = [Math.min(...places), Math.max(...places)];
  return [first < 0.05 * last ? 0 : first, last > first ? last : first + 1];
}

/** The crosshair is the same in all panels. The one under the pointer tells the values. */
function moved(from, x, byKeys) {
  for (const chart of charts.values()) {
    chart.leads = chart === from;
    chart.point(x);
  }
  showLegend(x);
  if (byKeys) $("spoken").textContent = from.spoken();
}

// ---- Image loss by timestep ----

/** The run whose image loss is shown by timestep. */
function bucketRun() {
  const names = chosen();
  if (names.includes(view.buckets)) return view.buckets;
  return names.find((name) => curves.get(name)?.names.includes(BUCKETS)) ?? names[0];
}

function showBuckets(names) {
  const able = names.filter((name) => curves.get(name)?.names.includes(BUCKETS));
  const run = bucketRun();
  const lines = able.length ? bucketLines(run) : [];
  $("buckets").hidden = !lines.length;
  if (!lines.length) return;
  const chart = chartOf(BUCKETS);
  if (!$("bucket-legend")) layBuckets(chart);
  options($("bucket-run"), able, run);
  $("bucket-run").parentElement.hidden = able.length < 2;
  chart.update(lines, viewOf(domainOf([run]), {}));
  showLegend(chart.at ?? null);
}

function bucketLines(run) {
  const places = [...(curves.get(run)?.points.keys() ?? [])].filter((name) => name.startsWith(`${BUCKETS}.`));
  const percent = 100 / places.length;
  const lines = places.map((name, place) => ({
    name: `${short(place * percent)} to ${short((place + 1) * percent)} %`,
    className: `bucket-${Math.round((place * 9) / Math.max(1, places.length - 1))}`,
    points: pointsOf(run, name),
  }));
  return lines.filter((line) => line.points.length);
}

function layBuckets(chart) {
  const select = element("select", { id: "bucket-run" });
  select.addEventListener("change", () => {
    view.buckets = select.value;
    writeHash();
    refresh();
  });
  chart.unit.textContent = "by share of the diffusion's timesteps, 0 % a clean image, 100 % noise";
  chart.figure.querySelector("figcaption").append(element("label", { class: "tool" }, "of ", select));
  const legend = element("div", { id: "bucket-legend", class: "legend", "aria-hidden": "true" });
  $("buckets").replaceChildren(chart.figure, legend);
}

/** The values of the buckets at the crosshair, or at the end, in place of a tip. */
function showLegend(x) {
  const chart = charts.get(BUCKETS);
  const legend = $("bucket-legend");
  if (!chart || !legend) return;
  const where = chart.where();
  const rows = chart.lines.map((line) => {
    const point = x === null || !where ? line.drawn.at(-1) : line.drawn.findLast((each) => each.x <= x);
    return element("div", {}, element("i", { class: `swatch ${line.className}` }), line.name, element("b", {}, figure(point?.y)));
  });
  legend.replaceChildren(element("p", {}, where || "At the end"), ...rows);
}

function options(select, names, value) {
  const known = [...select.options].map((option) => option.value);
  if (known.join("\n") !== names.join("\n")) select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  select.value = value;
}

// ---- Samples ----

async function readGrids(name) {
  const run = runs.get(name);
  const held = grids.get(name);
  if (held && held.written === run.written && run.state !== "running") return;
  const told = await get("/api/samples", [["run", name]]);
  if (told) grids.set(name, { ...told, written: run.written });
}

function sampleSteps(names) {
  const steps = names.flatMap((name) => (grids.get(name)?.grids ?? []).map((grid) => grid.step));
  return [...new Set(steps)].sort((a, b) => a - b);
}

/** The prompts of the grids, where all chosen runs have the same. */
function samePrompts(names) {
  const told = new Set(names.map((name) => (grids.get(name)?.prompts ?? []).join(", ")));
  return told.size === 1 ? [...told][0] : "";
}

function showSamples(names) {
  const steps = sampleSteps(names);
  $("scrub").hidden = steps.length < 2;
  $("prompts").textContent = steps.length ? samePrompts(names) : NO_GRIDS;
  const newest = steps.length - 1;
  const found = view.step === null ? newest : steps.findLastIndex((step) => step <= view.step);
  const at = Math.max(0, found);
  Object.assign($("step"), { max: Math.max(0, newest), value: at });
  $("shown").textContent = steps.length ? whole(steps[at]) : "";
  $("step").setAttribute("aria-valuetext", steps.length ? `step ${steps[at]}` : "none");
  place($("samples"), steps.length ? names.map((name) => sampleRow(name).figure) : []);
  for (const name of steps.length ? names : []) showSample(name, steps[at]);
  for (const near of [steps[at - 1], steps[at + 1]]) {
    if (near !== undefined) names.forEach((name) => imageOf(name, gridAt(name, near)));
  }
}

function sampleRow(name) {
  if (!sampleRows.has(name)) {
    const caption = element("figcaption", {}, key(runs.get(name).slot), element("span", { class: "name" }, name), element("small"));
    const image = element("img", { alt: "" });
    const none = element("p", { class: "faint" });
    image.addEventListener("load", () => enlarge(image));
    sampleRows.set(name, { figure: element("figure", { class: "sample" }, caption, image, none), caption, image, none });
  }
  return sampleRows.get(name);
}

/** The newest grid of a run at a step or before it. */
function gridAt(name, step) {
  return (grids.get(name)?.grids ?? []).findLast((grid) => grid.step <= step) ?? null;
}

async function showSample(name, step) {
  const row = sampleRow(name);
  const grid = gridAt(name, step);
  row.wanted = grid;
  row.image.hidden = !grid;
  row.none.textContent = grid ? "" : "No grid as early as this.";
  row.caption.querySelector("small").textContent = grid ? `step ${whole(grid.step)}` : "";
  const url = await imageOf(name, grid);
  // Until then another step may be wanted.
  if (!url || row.wanted !== grid) {
    if (grid && !url) row.none.textContent = "This grid cannot be read.";
    return;
  }
  row.image.alt = `Samples of ${name} at step ${grid.step}. ${(grids.get(name)?.prompts ?? []).join(", ")}`;
  if (row.image.src !== url) row.image.src = url;
}

/** An address of the image within this page, since an image's own request would carry no token. */
async function imageOf(name, grid) {
  if (!grid) return null;
  const known = `${name}\n${grid.step}\n${grid.version}`;
  if (!images.has(known)) {
    images.set(known, fetchImage(name, grid.step));
    dropOldImages();
  }
  const url = await images.get(known);
  if (!url) images.delete(known);
  return url;
}

async function fetchImage(name, step) {
  try {
    const answer = await ask(`/api/samples/${step}`, [["run", name]]);
    return answer.ok ? URL.createObjectURL(await answer.blob()) : null;
  } catch {
    return null;
  }
}

function dropOldImages() {
  while (images.size > IMAGES_KEPT) {
    const [known, url] = images.entries().next().value;
    images.delete(known);
    url.then((address) => address && URL.revokeObjectURL(address));
  }
}

/** By a whole factor, so that all pixels are squares of one size. */
function enlarge(image) {
  const room = image.parentElement.clientWidth;
  const most = chosen().length > 2 ? 320 : 640;
  const factor = Math.max(1, Math.min(Math.floor(room / image.naturalWidth), Math.floor(most / image.naturalHeight)));
  image.style.width = `${image.naturalWidth * factor}px`;
}

// ---- Log ----

function tailRun() {
  const names = chosen();
  if (names.includes(view.tail)) return view.tail;
  return names.find((name) => runs.get(name).state === "running") ?? names[0] ?? "";
}

function showTail(names) {
  options($("tail"), names, tailRun());
  $("pick").hidden = names.length < 2;
}

async function readLog() {
  const run = tailRun();
  if (!run) return;
  if (run !== log.run) Object.assign(log, { run, cursor: "" });
  const { cursor } = log;
  const told = await get("/api/log", [["run", run], ["cursor", cursor]]);
  // Whoever asked at the same time has shown these lines.
  if (!told || run !== log.run || cursor !== log.cursor) return;
  const pre = $("log");
  const isAtEnd = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 24;
  const isNew = told.whole;
  if (isNew) pre.replaceChildren();
  log.cursor = told.cursor;
  pre.append(...told.lines.map(logLine));
  while (pre.children.length > LOG_LINES) pre.firstChild.remove();
  if (!pre.children.length) pre.replaceChildren(element("span", { class: "faint" }, told.note ?? "Nothing yet."));
  if (isAtEnd || isNew) pre.scrollTop = pre.scrollHeight;
  else if (told.lines.length) $("newest").hidden = false;
}

function logLine(text) {
  const [, time, level, words] = /^\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d)\S* ([A-Z]+) (.*)$/.exec(text) ?? [null, "", "", text];
  const line = element("span", { class: `entry ${level.toLowerCase()}` });
  line.append(element("time", {}, time), level && level !== "INFO" ? `${level.toLowerCase()}: ${words}` : words);
  return line;
}

// ---- Differences ----

async function compare() {
  const names = chosen();
  const wanted = names.join("\n");
  if (wanted === comparedKey) return;
  if (names.length < 2) {
    showDifferences(null);
  } else {
    const told = await get("/api/differences", names.map((name) => ["run", name]));
    if (!told) return;
    showDifferences(told);
  }
  comparedKey = wanted;
}

function showDifferences(told) {
  $("same").textContent = differencesInWords(told);
  $("differences").hidden = !told?.rows.length;
  if (!told?.rows.length) return;
  const head = told.runs.map((name) => element("th", { scope: "col" }, key(runs.get(name)?.slot ?? 0), name));
  const body = told.rows.map(({ name, values }) => {
    const cells = values.map((value) => element("td", value === null ? { class: "faint" } : {}, value ?? "not there"));
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
  });
  $("differences").replaceChildren(element("thead", {}, element("tr", {}, element("td"), ...head)), element("tbody", {}, ...body));
}

function differencesInWords(told) {
  if (!told) return "Choose two runs or more to see how their configurations differ.";
  const unread = told.unreadable.length ? `No config.yaml can be read of ${told.unreadable.join(", ")}. ` : "";
  return unread + (told.rows.length ? "" : "These configurations are the same.");
}

// ---- What people do ----

function showControls() {
  for (const radio of document.getElementsByName("axis")) radio.checked = radio.value === view.axis;
  $("smoothing").value = view.smoothing;
  $("smoothed").textContent = view.smoothing ? `${view.smoothing} %` : "off";
  $("smoothing").setAttribute("aria-valuetext", view.smoothing ? `over ${view.smoothing} % of a run` : "off");
  $("logarithmic").checked = view.logarithmic;
}

function changed(values) {
  Object.assign(view, values);
  writeHash();
  showControls();
  showCurves(chosen());
}

function listen() {
  for (const radio of document.getElementsByName("axis")) {
    radio.addEventListener("change", () => changed({ axis: radio.value }));
  }
  $("smoothing").addEventListener("input", (event) => changed({ smoothing: Number(event.target.value) }));
  $("logarithmic").addEventListener("change", (event) => changed({ logarithmic: event.target.checked }));
  $("filter").addEventListener("input", showChoice);
  $("all").addEventListener("click", () => choose([...runs.keys()].filter((name) => !rows.get(name).hidden)));
  $("none").addEventListener("click", () => choose([]));
  $("step").addEventListener("input", (event) => scrub(Number(event.target.value)));
  $("tail").addEventListener("change", (event) => {
    view.tail = event.target.value;
    writeHash();
    readLog();
  });
  $("newest").addEventListener("click", () => ($("log").scrollTop = $("log").scrollHeight));
  $("log").addEventListener("scroll", ({ target }) => {
    if (target.scrollHeight - target.scrollTop - target.clientHeight < 24) $("newest").hidden = true;
  });
  $("token").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN_KEY, $("secret").value.trim());
    $("secret").value = "";
    refresh();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));
  window.addEventListener("hashchange", () => {
    readHash();
    showControls();
    refresh();
  });
  window.addEventListener("resize", () => [...sampleRows.values()].forEach(({ image }) => image.naturalWidth && enlarge(image)));
}

function scrub(at) {
  const steps = sampleSteps(chosen());
  // At its end the slider follows a run under way.
  view.step = at === steps.length - 1 ? null : steps[at];
  writeHash();
  showSamples(chosen());
}

readHash();
showControls();
listen();
refresh();
