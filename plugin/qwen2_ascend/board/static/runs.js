// Runs: the list, their curves in one picture, live; two runs side by side; log and checkpoints of one.

import { Chart, smoothed } from "./chart.js";
import {
  ask, bytes, checkbox, COLOURS, field, h, quiet, replaceAround, select, short, showFaults, t, timeText,
} from "./ui.js";

const SERIES = ["loss", "validation_loss", "grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_bytes",
  "joules_per_token"];
const FIRST_SHOWN = 6;

let runs = [];
let chosen = null; // names of the runs in the picture
let focused = null; // the run whose log and checkpoints are shown
let fetched = new Map(); // by name: what the server said of its curves
let pair = { first: "", second: "" };
let noise = null;
let smoothing = 0;
let log = false;
let filter = "";
let places = null;

const colours = new Map();

function colourOf(name) {
  if (!colours.has(name)) colours.set(name, COLOURS[colours.size % COLOURS.length]);
  return colours.get(name);
}

function charts() {
  const found = {
    loss: new Chart(t("chart_loss")),
    grad_norm: new Chart(t("chart_grad_norm")),
    lr: new Chart(t("chart_lr"), { fromZero: true }),
    tokens_per_second: new Chart(t("chart_tokens_per_second"), { fromZero: true }),
    mfu: new Chart(t("chart_mfu"), { fromZero: true, scale: (value) => 100 * value }),
    peak_memory_bytes: new Chart(t("chart_peak_memory_bytes"), { fromZero: true, scale: (value) => value / 1e9 }),
    joules_per_token: new Chart(t("chart_joules_per_token"), { fromZero: true }),
  };
  for (const [name, chart] of Object.entries(found)) chart.element.id = `chart-${name}`;
  return found;
}

async function build(panel) {
  places = {
    faults: h("div"),
    list: h("tbody", { id: "run-list" }),
    notes: h("div", { id: "run-notes" }),
    charts: charts(),
    detail: h("section", { id: "run-detail" }),
    compare: h("section", { id: "run-compare" }),
    verdict: h("div", { id: "noise-verdict" }),
  };
  fetched = new Map();
  panel.append(places.faults, h("div", { class: "columns" },
    h("aside", { class: "run-aside" }, controls(), h("div", { class: "wide" }, h("table", { class: "run-table" }, h("thead", {}, h("tr", {},
      ["", "run", "iteration", "loss"].map((key) => h("th", {}, key ? t(`column_${key}`) : "")))), places.list))),
    h("div", { class: "run-main" }, places.notes, noiseControls(),
      h("div", { class: "charts" }, Object.values(places.charts).map((chart) => chart.element)),
      places.detail, places.compare)));
  await poll();
}

function controls() {
  const search = h("input", { type: "search", placeholder: t("filter"), value: filter, id: "run-filter" });
  search.addEventListener("input", () => {
    filter = search.value;
    drawList();
  });
  const button = (id, action) => h("button", { type: "button", id, onclick: action }, t(id.replace("-", "_")));
  return h("div", { class: "row" }, search,
    button("select-all", () => choose(visible().map((run) => run.name))), button("select-none", () => choose([])));
}

function noiseControls() {
  const smooth = select("smoothing", ["0", "0.6", "0.9", "0.97"], String(smoothing), (one) => (one === "0" ? t("none") : one));
  smooth.addEventListener("change", () => {
    smoothing = Number(smooth.value);
    drawCharts();
  });
  const scale = checkbox("log", log);
  scale.addEventListener("change", () => {
    log = scale.checked;
    drawCharts();
  });
  for (const key of ["first", "second"]) {
    const control = h("select", { name: key, id: `pair-${key}` });
    control.addEventListener("change", () => {
      pair[key] = control.value;
      drawPair();
    });
    places[key] = control;
  }
  return h("div", { class: "card" }, h("div", { class: "row" }, field("smoothing", smooth), field("log_axis", scale),
    field("pair_first", places.first), field("pair_second", places.second),
    h("button", { type: "button", id: "pair-noise", onclick: askNoise }, t("noise_go")),
    h("button", { type: "button", id: "pair-compare", onclick: askCompare }, t("compare_go"))),
  quiet("noise_about"), places.verdict);
}

function visible() {
  return runs.filter((run) => run.name.toLowerCase().includes(filter.toLowerCase()));
}

function choose(names) {
  chosen = new Set(names);
  drawList();
  askCurves();
}

async function poll() {
  const mine = places;
  try {
    const found = await ask("runs");
    if (mine !== places) return;
    runs = found.runs;
    if (chosen === null && runs.length) chosen = new Set(runs.slice(0, FIRST_SHOWN).map((run) => run.name));
    if (focused === null && runs.length) focused = runs[0].name;
    showFaults(places.faults, null);
    drawList();
    drawPairChoices();
    await askCurves();
    if (focused !== null) await askDetail();
  } catch (error) {
    if (mine === places) showFaults(places.faults, error);
  }
}

function drawList() {
  places.list.replaceChildren(...visible().map(listRow));
  if (!runs.length) places.list.append(h("tr", {}, h("td", { colspan: 4, class: "quiet" }, t("no_runs"))));
}

function listRow(run) {
  const box = checkbox("", chosen?.has(run.name) ?? false);
  box.setAttribute("aria-label", run.name);
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(run.name);
    else chosen.delete(run.name);
    drawList();
    askCurves();
  });
  const swatch = h("i", { class: "swatch", style: chosen?.has(run.name) ? { background: colourOf(run.name) } : {} });
  const name = h("button", { type: "button", class: "link", title: run.name, onclick: () => focus(run.name) }, run.name);
  const total = run.train_iters ? `/${run.train_iters}` : "";
  const state = run.is_live ? h("span", { class: "live" }, t("live")) : null;
  return h("tr", { class: run.name === focused ? "is-picked" : "", "data-run": run.name },
    h("td", {}, box, swatch), h("td", { class: "name" }, name, state, run.error ? h("div", { class: "fault" }, run.error) : null),
    h("td", { class: "number" }, run.iteration === null ? "–" : `${run.iteration}${total}`),
    h("td", { class: "number" }, short(run.loss)));
}

function focus(name) {
  focused = name;
  drawList();
  askDetail();
}

// --- curves ---------------------------------------------------------------------------------------

async function askCurves() {
  const mine = places;
  const names = [...(chosen || [])].filter((name) => runs.some((run) => run.name === name));
  if (names.length) {
    const known = Object.fromEntries(names.filter((name) => fetched.has(name)).map((name) => [name, fetched.get(name).revision]));
    const found = await ask("curves", { runs: names, series: SERIES, known });
    if (mine !== places) return;
    for (const [name, one] of Object.entries(found.runs)) if (!one.same) fetched.set(name, one);
  }
  drawCharts();
}

function drawCharts() {
  const names = runs.map((run) => run.name).filter((name) => chosen?.has(name) && fetched.has(name));
  const few = names.length <= 8;
  for (const [series, chart] of Object.entries(places.charts)) {
    const curves = [];
    const lines = [];
    for (const name of names) {
      const found = fetched.get(name);
      const colour = colourOf(name);
      const points = smoothed(found.curves[series] || [], smoothing);
      curves.push({ label: name, colour, points, shade: few });
      if (series === "loss") {
        curves.push({ label: `${name} ${t("validation")}`, colour, points: found.curves.validation_loss || [], dashed: true });
      }
      if (series === "peak_memory_bytes" && found.planned_memory_bytes && few) {
        lines.push({ value: found.planned_memory_bytes, colour, label: `${t("planned")} ${(found.planned_memory_bytes / 1e9).toPrecision(2)}` });
      }
    }
    chart.show(curves, { band: series === "loss" ? noise?.band : null, lines, log: log && !["lr", "mfu"].includes(series), none: t(`none_${series}`) });
  }
  drawNotes(names);
}

function drawNotes(names) {
  const lines = [];
  for (const name of names) {
    const found = fetched.get(name);
    if (found.error) lines.push([true, `${name}: ${found.error}`]);
    if (found.num_bad_lines) {
      lines.push([true, t("bad_lines", { run: name, number: found.num_bad_lines, first: found.first_bad_line })]);
    }
  }
  const sampled = names.filter((name) => fetched.get(name).is_sampled).length;
  if (sampled) lines.push([false, t("sampled", { number: sampled })]);
  places.notes.replaceChildren(...lines.map(([isFault, line]) => h("div", { class: isFault ? "fault" : "quiet" }, line)));
}

// --- two runs -------------------------------------------------------------------------------------

function drawPairChoices() {
  const names = runs.map((run) => run.name);
  for (const [index, key] of ["first", "second"].entries()) {
    const control = places[key];
    if (!names.includes(pair[key])) pair[key] = names[Math.min(index, names.length - 1)] || "";
    if ([...control.options].map((one) => one.value).join("\n") === names.join("\n")) continue;
    control.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === pair[key] }, name)));
  }
}

function drawPair() {
  noise = null;
  places.verdict.replaceChildren();
  places.compare.replaceChildren();
  drawCharts();
}

async function askNoise() {
  showFaults(places.verdict, null);
  try {
    noise = await ask("noise", { ...pair, series: "loss", runs: [...(chosen || [])] });
    const lines = Object.entries(noise.others).map(([name, lies]) => {
      if (!lies) return t("noise_apart", { run: name });
      const share = `${(100 * lies.share).toFixed(0)}%`;
      return lies.since === null ? t("noise_inside", { run: name, share })
        : t("noise_outside", { run: name, share, since: Math.round(lies.since) });
    });
    places.verdict.append(h("p", {}, t("noise_shown", { factor: noise.factor })), ...lines.map((line) => h("p", {}, line)));
  } catch (error) {
    noise = null;
    showFaults(places.verdict, error);
  }
  drawCharts();
}

async function askCompare() {
  showFaults(places.compare, null);
  try {
    const found = await ask("compare", pair);
    places.compare.append(h("h3", {}, t("side_by_side")), ...found.notes.map((note) => h("div", { class: "fault" }, note)),
      differences("configuration", found.configuration), differences("environment", found.environment));
    places.compare.scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    showFaults(places.compare, error);
  }
}

function differences(key, rows) {
  if (!rows.length) return quiet(`no_${key}`);
  const count = rows.filter((row) => row.differs).length;
  const table = h("table", { class: "differences", id: `differences-${key}` }, h("thead", {}, h("tr", {},
    h("th", {}, t(key)), h("th", {}, pair.first), h("th", {}, pair.second))), h("tbody", {}, rows.map((row) =>
    h("tr", { class: row.differs ? "differs" : "" }, h("td", {}, row.name), h("td", {}, row.first ?? "–"), h("td", {}, row.second ?? "–")))));
  return h("details", { open: count <= 40 }, h("summary", {}, t("differing", { what: t(key), count, total: rows.length })), h("div", { class: "wide" }, table));
}

// --- one run --------------------------------------------------------------------------------------

async function askDetail() {
  const name = focused;
  const mine = places;
  let found;
  try {
    found = await ask("run", { run: name });
  } catch (error) {
    if (mine === places && name === focused) showFaults(places.detail, error);
    return;
  }
  if (mine !== places || name !== focused) return;
  const open = new Set([...places.detail.querySelectorAll("details[open]")].map((one) => one.id));
  const logBox = found.log ? h("pre", { class: "log", id: "run-log" }, found.log_lines.join("\n")) : quiet("no_log");
  replaceAround(places.detail, h("h3", {}, name), h("p", { class: "quiet path" }, found.folder),
    ...found.notes.map((note) => h("div", { class: "fault" }, note)),
    h("div", { class: "halves" },
      h("div", {}, h("h4", {}, t("checkpoints")), checkpointTable(found.checkpoints)),
      h("div", {}, h("h4", {}, found.log ? `${t("log")} ${found.log}` : t("log")), logBox,
        found.log_error ? h("div", { class: "fault" }, found.log_error) : null)),
    plainTable("configuration", found.configuration, open), plainTable("environment", found.environment, open));
}

function checkpointTable(list) {
  if (!list.length) return quiet("no_checkpoints");
  return h("table", { id: "checkpoints" }, h("tbody", {}, list.map((one) => h("tr", {},
    h("td", {}, one.folder, one.is_last ? h("span", { class: "live" }, t("last")) : null),
    h("td", { class: "number" }, bytes(one.size)), h("td", {}, timeText(one.modified))))));
}

function plainTable(key, values, open) {
  const rows = Object.entries(values);
  if (!rows.length) return quiet(`no_${key}`);
  return h("details", { id: `detail-${key}`, open: open.has(`detail-${key}`) }, h("summary", {}, `${t(key)} (${rows.length})`),
    h("div", { class: "wide" }, h("table", {}, h("tbody", {}, rows.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", {}, value)))))));
}

export const runsPanel = { build, poll };
