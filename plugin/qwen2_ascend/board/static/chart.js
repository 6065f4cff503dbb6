// A chart of curves: means as lines, what lies between lowest and highest as a shade.

import { h, short, t } from "./ui.js";

const LEFT = 58;
const RIGHT = 26;
const TOP = 10;
const BOTTOM = 24;
const HEIGHT = 210;

/** Numbers at which an axis from `low` to `high` is marked. */
function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((one) => one * power >= rough) || 10);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) {
    found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  }
  return found;
}

/** Decades of a logarithmic axis. */
function decades(low, high) {
  const found = [];
  for (let at = Math.floor(Math.log10(low)); at <= Math.ceil(Math.log10(high)); at += 1) found.push(10 ** at);
  const inside = found.filter((one) => one >= low && one <= high);
  return inside.length >= 2 ? inside : ticks(low, high, 4).filter((one) => one > 0);
}

/** An exponential mean that leans on what came before by `weight`, without its start's pull. */
export function smoothed(points, weight) {
  if (!weight) return points;
  let sum = 0;
  let known = 0;
  return points.map(([x, mean, low, high]) => {
    sum = weight * sum + (1 - weight) * mean;
    known = weight * known + (1 - weight);
    return [x, sum / known, low, high];
  });
}

function straight(pen, x, y, toX, toY) {
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(toX, toY);
  pen.stroke();
}

export class Chart {
  /** `title` is a heading; `options.scale(value)` turns stored numbers into shown ones. */
  constructor(title, options = {}) {
    this.options = options;
    this.curves = [];
    this.canvas = h("canvas", { height: HEIGHT });
    this.tip = h("div", { class: "tip" });
    this.heading = h("h3", {}, title);
    this.empty = h("p", { class: "quiet" });
    this.element = h("figure", { class: "chart is-empty" }, this.heading, this.canvas, this.tip, this.empty);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  /** Shows curves: {label, colour, points [[x, mean, low, high]], dashed, dots, shade}. */
  show(curves, { band = null, lines = [], log = false, none = "" } = {}) {
    this.curves = curves.filter((curve) => curve.points.length);
    this.band = band;
    this.lines = this.curves.length ? lines : [];
    this.log = log;
    this.empty.textContent = this.curves.length ? "" : none;
    this.element.classList.toggle("is-empty", !this.curves.length);
    this.draw();
  }

  scale(value) {
    return this.options.scale ? this.options.scale(value) : value;
  }

  range() {
    let left = Math.min(...this.curves.map((curve) => curve.points[0][0]));
    let right = Math.max(...this.curves.map((curve) => curve.points.at(-1)[0]));
    const values = this.curves.flatMap((curve) => curve.points.flatMap(([, mean, least, most]) => (curve.shade ? [mean, least, most] : [mean])));
    const drawn = values.filter((value) => !this.log || value > 0).concat(this.lines.map((line) => line.value));
    let low = drawn.reduce((least, value) => Math.min(least, value), Infinity);
    let high = drawn.reduce((most, value) => Math.max(most, value), -Infinity);
    if (this.options.fromZero && !this.log) low = Math.min(low, 0);
    if (left === right) [left, right] = [left - 1, right + 1];
    [low, high] = [this.scale(low), this.scale(high)];
    if (!(low < high)) [low, high] = [low - (Math.abs(low) * 0.05 || 1), high + (Math.abs(high) * 0.05 || 1)];
    const margin = this.log ? 0 : 0.04 * (high - low);
    return { left, right, low: this.options.fromZero && low === 0 ? 0 : low - margin, high: high + margin };
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width || !this.curves.length) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = HEIGHT * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${HEIGHT}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, HEIGHT);
    const range = this.range();
    const logs = this.log && range.low > 0;
    const [low, high] = logs ? [Math.log(range.low), Math.log(range.high)] : [range.low, range.high];
    this.x = (value) => LEFT + ((value - range.left) / (range.right - range.left)) * (width - LEFT - RIGHT);
    const yShown = (value) => {
      const at = logs ? Math.log(Math.max(value, 1e-300)) : value;
      return HEIGHT - BOTTOM - ((at - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    };
    this.y = (stored) => yShown(this.scale(stored));
    this.drawAxes(pen, width, range, logs, yShown);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP - 2, width - LEFT - RIGHT + 4, HEIGHT - TOP - BOTTOM + 4);
    pen.clip();
    if (this.band) this.drawBand(pen);
    for (const curve of this.curves) this.drawCurve(pen, curve);
    for (const line of this.lines) this.drawLine(pen, line, width);
    pen.restore();
  }

  drawAxes(pen, width, range, logs, yShown) {
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = "#5b6670";
    pen.strokeStyle = "#e6eaed";
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const marks = logs ? decades(range.low, range.high) : ticks(range.low, range.high, 4);
    for (const mark of marks) {
      const y = yShown(mark);
      straight(pen, LEFT, y, width - RIGHT, y);
      pen.fillText(short(mark, 3), LEFT - 6, y);
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const mark of ticks(range.left, range.right, Math.max(2, Math.floor(width / 110)))) {
      pen.fillText(mark >= 1e6 ? short(mark, 2) : mark.toLocaleString("en-US"), this.x(mark), HEIGHT - BOTTOM + 7);
    }
  }

  drawBand(pen) {
    const { iterations, middle, width } = this.band;
    const edge = (sign) => iterations.map((x, i) => [x, middle[i] + sign * width[i]]);
    this.outline(pen, edge(1), edge(-1));
    pen.fillStyle = "rgba(90, 100, 110, .22)";
    pen.fill();
  }

  /** The outline of what lies between two lines. */
  outline(pen, upper, lower) {
    pen.beginPath();
    for (const [x, y] of [...upper, ...lower.reverse()]) pen.lineTo(this.x(x), this.y(y));
    pen.closePath();
  }

  drawCurve(pen, curve) {
    const points = curve.points;
    if (curve.shade && points.length > 2) {
      this.outline(pen, points.map(([x, , , most]) => [x, most]), points.map(([x, , least]) => [x, least]));
      pen.globalAlpha = 0.13;
      pen.fillStyle = curve.colour;
      pen.fill();
      pen.globalAlpha = 1;
    }
    pen.strokeStyle = curve.colour;
    pen.fillStyle = curve.colour;
    pen.lineWidth = curve.dashed ? 1.2 : 1.6;
    pen.setLineDash(curve.dashed ? [4, 3] : []);
    pen.beginPath();
    for (const [x, mean] of points) pen.lineTo(this.x(x), this.y(mean));
    pen.stroke();
    pen.setLineDash([]);
    if (points.length <= 30) {
      for (const [x, mean] of points) {
        pen.beginPath();
        pen.arc(this.x(x), this.y(mean), curve.dashed ? 3.2 : 2.2, 0, 7);
        pen.fill();
      }
    }
  }

  drawLine(pen, line, width) {
    pen.strokeStyle = line.colour;
    pen.setLineDash([7, 4]);
    pen.lineWidth = 1;
    straight(pen, LEFT, this.y(line.value), width - RIGHT, this.y(line.value));
    pen.setLineDash([]);
    pen.fillStyle = line.colour;
    pen.textAlign = "right";
    pen.textBaseline = "bottom";
    pen.fillText(line.label, width - RIGHT - 4, this.y(line.value) - 2);
  }

  hover(event) {
    if (!this.curves.length || !this.x) return;
    const box = this.canvas.getBoundingClientRect();
    const at = event.clientX - box.left;
    const rows = [];
    let nearest = null;
    for (const curve of this.curves) {
      const point = curve.points.reduce((best, one) =>
        (Math.abs(this.x(one[0]) - at) < Math.abs(this.x(best[0]) - at) ? one : best));
      if (Math.abs(this.x(point[0]) - at) > 30) continue;
      nearest = nearest === null || Math.abs(this.x(point[0]) - at) < Math.abs(this.x(nearest) - at) ? point[0] : nearest;
      rows.push(h("div", {}, h("i", { style: { background: curve.colour } }), `${curve.label}  ${short(this.scale(point[1]), 5)}`));
    }
    this.draw();
    this.tip.replaceChildren();
    this.tip.classList.toggle("is-shown", rows.length > 0);
    if (!rows.length) return;
    const pen = this.canvas.getContext("2d");
    pen.strokeStyle = "#9aa5ad";
    straight(pen, this.x(nearest), TOP, this.x(nearest), HEIGHT - BOTTOM);
    this.tip.append(h("b", {}, `${t("iteration")} ${nearest.toLocaleString("en-US")}`), ...rows.slice(0, 12));
    const width = this.element.clientWidth;
    this.tip.style.left = at > width / 2 ? "auto" : `${at + 14}px`;
    this.tip.style.right = at > width / 2 ? `${width - at + 14}px` : "auto";
  }

  leave() {
    this.tip.classList.remove("is-shown");
    this.draw();
  }
}
