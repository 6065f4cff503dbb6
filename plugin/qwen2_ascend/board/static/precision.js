// Precision: a report of align_qwen2.py as a heat map; a cell shows its sublayer.

import { ask, field, h, quiet, select, short, showFaults, t } from "./ui.js";

let report = null;
let name = null;
let cell = null;

async function build(panel) {
  const { reports } = await ask("reports");
  if (!reports.length) {
    panel.append(quiet("no_reports"), h("pre", { class: "command" },
      "python launch/align_qwen2.py --load MODEL --report FOLDER/align"));
    return;
  }
  const result = h("section", { id: "report" });
  if (!reports.includes(name)) [name, report, cell] = [reports[0], null, null];
  const choice = select("report", reports, name);
  choice.addEventListener("change", () => {
    [name, report, cell] = [choice.value, null, null];
    show(result);
  });
  panel.append(h("div", { class: "row" }, field("report", choice)), result);
  await show(result);
}

async function show(result) {
  try {
    report ??= await ask("report", { report: name });
  } catch (error) {
    showFaults(result, error);
    return;
  }
  const detail = h("aside", { id: "cell-detail", class: "card" }, quiet("pick_cell"));
  result.replaceChildren(
    h("p", { class: report.aligned ? "verdict good" : "verdict bad", id: "verdict" }, report.verdict || t(report.aligned ? "aligned" : "parted")),
    h("p", { class: "quiet" }, report.origin), scale(),
    h("div", { class: "halves map-and-cell" }, h("div", { class: "wide" }, map(detail)), detail));
  const first = report.cells.find((one) => one.name === (cell || report.first));
  if (first) showCell(detail, first);
}

/** 0 below a tenth of the noise, 1 at the limit, above it more. */
function colour(one) {
  if (one.ratio === null) return one.parted ? "#a11d2f" : "#eef1f3";
  const limit = report.noise_factor || 4;
  if (one.ratio > limit || one.parted) {
    const far = Math.min(1, Math.log10(Math.max(one.ratio / limit, 1)) / 3);
    return `rgb(${200 - 60 * far}, ${70 - 50 * far}, ${70 - 30 * far})`;
  }
  const near = Math.min(1, Math.max(0, one.ratio / limit));
  return `rgb(${232 - 10 * near}, ${243 - 50 * near}, ${236 - 120 * near})`;
}

function scale() {
  const limit = report.noise_factor || 4;
  const marks = [0, limit / 4, limit / 2, limit, limit * 3, limit * 30, limit * 300].map((ratio) =>
    h("span", {}, h("i", { style: { background: colour({ ratio, parted: ratio > limit }) } }), `${short(ratio, 2)}×`));
  return h("p", { class: "legend" }, h("span", {}, t("ratio_about", { limit })), marks);
}

function map(detail) {
  const by = new Map(report.cells.map((one) => [`${one.layer}/${one.column}`, one]));
  const head = h("tr", {}, h("th", {}, t("layer")), report.columns.map((one) => h("th", { class: "slanted" }, h("span", {}, one.label))));
  const rows = Array.from({ length: report.layers }, (_, layer) => {
    const cells = report.columns.map((column) => by.get(`${layer}/${column.name}`));
    return h("tr", {}, h("th", {}, String(layer)), cells.map((one) => h("td", {}, one && heatButton(one, detail))));
  });
  const outside = report.cells.filter((one) => one.layer === null);
  return h("div", {}, h("table", { class: "heat", id: "heat" }, h("thead", {}, head), h("tbody", {}, rows)),
    h("div", { class: "outside" }, outside.map((one) => h("span", {}, `${one.place} `, heatButton(one, detail)))));
}

function heatButton(one, detail) {
  const text = one.name === report.first ? "1" : one.parted ? "×" : "";
  return h("button", { type: "button", class: "cell", title: `${one.place} ${short(one.ratio, 3)}×`, "data-cell": one.name,
    style: { background: colour(one) }, onclick: () => showCell(detail, one) }, text);
}

function showCell(detail, one) {
  cell = one.name;
  const rows = [["own", one.own], ["noise", one.noise], ["total", one.total], ["total_noise", one.total_noise]]
    .filter(([, value]) => value && Object.keys(value).length);
  detail.replaceChildren(h("h3", {}, one.place),
    h("p", { class: one.parted ? "verdict bad" : "verdict good" }, t(one.parted ? "cell_parted" : "cell_aligned", { ratio: short(one.ratio, 3), limit: report.noise_factor })),
    h("table", {}, h("thead", {}, h("tr", {}, h("th", {}), h("th", {}, t("mean")), h("th", {}, t("worst")))), h("tbody", {}, rows.map(([key, value]) =>
      h("tr", {}, h("td", {}, t(`error_${key}`)), h("td", { class: "number" }, short(value.mean, 3)), h("td", { class: "number" }, short(value.worst, 3)))))),
    histogram(one.histogram));
  for (const mine of document.querySelectorAll(".cell")) mine.classList.toggle("is-picked", mine.dataset.cell === one.name);
}

/** With empty bins on both sides, so that a few bins look like the peak that they are. */
function widened({ counts, edges }) {
  const step = edges[1] / edges[0];
  const more = Math.max(2, Math.ceil((24 - counts.length) / 2));
  const last = edges[edges.length - 1];
  const empty = new Array(more).fill(0);
  return {
    counts: [...empty, ...counts, ...empty],
    edges: [...empty.map((_, index) => edges[0] / step ** (more - index)), ...edges, ...empty.map((_, index) => last * step ** (index + 1))],
  };
}

function histogram(found) {
  if (!found) return quiet("no_histogram");
  const { counts, edges } = widened(found);
  const most = Math.max(...counts, 1);
  const bars = counts.map((count, index) => h("i", {
    title: `${short(edges[index], 2)} – ${short(edges[index + 1], 2)}: ${count}`,
    style: { height: `${(100 * count) / most}%` },
  }));
  return h("figure", { class: "histogram", id: "histogram" }, h("figcaption", {}, t("histogram_about")), h("div", { class: "bars" }, bars),
    h("div", { class: "ends" }, h("span", {}, short(edges[0], 2)), h("span", {}, short(edges[edges.length - 1], 2))));
}

export const precisionPanel = { build };
