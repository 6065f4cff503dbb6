// What all panels use: elements, words in two languages, questions to the server, numbers as text.
// Texts from elsewhere become text nodes, never HTML.

import { WORDS } from "./words.js";

export const COLOURS = ["#1f77b4", "#d9822b", "#2c9c69", "#c23b4b", "#7a5fb5", "#8c6d4f", "#d070b0", "#5f6b73",
  "#a3a128", "#17a2b8"];

let language = localStorage.getItem("language")
  || ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");

export function currentLanguage() {
  return language;
}

export function setLanguage(wanted) {
  language = wanted;
  localStorage.setItem("language", wanted);
}

/** The word for `key`; {name} in it is replaced by values.name. */
export function t(key, values = {}) {
  const text = WORDS[language][key] ?? WORDS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** A text that the server gives by its name; a list of them has commas between. */
export function spoken(text) {
  if (Array.isArray(text)) return text.map(spoken).join(t("comma"));
  if (text === null || typeof text !== "object") return String(text);
  return t(text.key, Object.fromEntries(Object.entries(text.values).map(([name, value]) => [name, spoken(value)])));
}

/** An element. Attributes whose names begin with "on" are listeners, `style` is an object (the page's policy
 * forbids a text); children are elements or texts. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export class Faults extends Error {
  constructor(list) {
    super(list.join("\n"));
    this.list = list;
  }
}

/** Asks the server; throws Faults with what is wrong. */
export async function ask(name, form = {}) {
  const response = await post(name, form);
  const found = await response.json();
  if (!response.ok) throw new Faults(found.faults || [response.statusText]);
  return found;
}

/** Asks the server and hands on each line of its answer as it comes. */
export async function askLines(name, form, take) {
  const response = await post(name, form);
  if (!response.ok) throw new Faults((await response.json()).faults);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const found = JSON.parse(line);
      if (found.faults) throw new Faults(found.faults);
      take(found);
    }
  }
}

async function post(name, form) {
  try {
    return await fetch(`/api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(form),
    });
  } catch {
    throw new Faults([t("board_is_gone")]);
  }
}

/** Shows what went wrong in a place of its own, or clears it. */
export function showFaults(place, error) {
  place.replaceChildren();
  if (!error) return;
  if (!(error instanceof Faults)) console.error(error);
  const list = error instanceof Faults ? error.list : [String(error)];
  place.append(h("div", { class: "faults", role: "alert" }, list.map((fault) => h("div", {}, fault))));
}

export function quiet(key, values) {
  return h("p", { class: "quiet" }, t(key, values));
}

/** Puts children in place of others; a log among them stays at its end, or where it was scrolled to. */
export function replaceAround(element, ...children) {
  const old = element.querySelector(".log");
  const atEnd = !old || old.scrollHeight - old.scrollTop - old.clientHeight < 30;
  const top = old?.scrollTop;
  element.replaceChildren(...children);
  const log = element.querySelector(".log");
  if (log) log.scrollTop = atEnd ? log.scrollHeight : top;
}

/** Runs an action with its button off and its faults shown. */
export async function guarded(button, place, action) {
  button.disabled = true;
  showFaults(place, null);
  try {
    await action();
  } catch (error) {
    showFaults(place, error);
  } finally {
    button.disabled = false;
  }
}

// --- forms ----------------------------------------------------------------------------------------

/** A labelled field. */
export function field(key, control) {
  return h("label", { class: "field" }, h("span", {}, t(key)), control);
}

export function textInput(name, value, options = null) {
  const input = h("input", { type: "text", name, value, autocomplete: "off", spellcheck: "false" });
  if (!options) return input;
  const list = h("datalist", { id: `list-${name}-${Math.random().toString(36).slice(2)}` },
    options.map((one) => h("option", { value: one })));
  input.setAttribute("list", list.id);
  const both = h("span", { class: "with-list" }, input, list);
  both.input = input;
  return both;
}

export function numberInput(name, value, attributes = {}) {
  return h("input", { type: "number", name, value, ...attributes });
}

/** A choice of values, which `shown(value)` puts into words. */
export function select(name, values, value, shown = (one) => one) {
  return h("select", { name }, values.map((one) => h("option", { value: one, selected: one === value }, shown(one))));
}

export function checkbox(name, checked) {
  return h("input", { type: "checkbox", name, checked });
}

/** What the named controls in an element hold. */
export function formOf(element) {
  const form = {};
  for (const control of element.querySelectorAll("input[name], select[name], textarea[name]")) {
    form[control.name] = control.type === "checkbox" ? control.checked : control.value;
  }
  return form;
}

/** Copies a text; where the browser has no clipboard for plain http, by way of a text field. */
async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = h("textarea", { class: "offscreen" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

export function copyButton(text) {
  const button = h("button", { type: "button", class: "copy" }, t("copy"));
  button.addEventListener("click", async () => {
    await copy(text());
    button.textContent = t("copied");
    setTimeout(() => { button.textContent = t("copy"); }, 1500);
  });
  return button;
}

// --- numbers --------------------------------------------------------------------------------------

/** A number in a few digits. */
export function short(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3) return value.toExponential(Math.min(2, digits - 1));
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

export function gb(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const value = bytes / 1e9;
  return value >= 0.1 || value === 0 ? value.toFixed(1) : value.toPrecision(1);
}

/** Bytes with a unit. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let rest = value;
  while (rest >= 1000 && unit < units.length - 1) {
    rest /= 1000;
    unit += 1;
  }
  return `${rest >= 100 || unit === 0 ? Math.round(rest) : rest.toFixed(1)} ${units[unit]}`;
}

export function timeText(seconds) {
  return new Date(1000 * seconds).toLocaleString(language === "zh" ? "zh-CN" : "en-GB");
}
