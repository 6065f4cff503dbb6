// Chat: one or two models, each with its own answers to the same questions.

import { ask, askLines, field, guarded, h, numberInput, quiet, short, showFaults, t, textInput } from "./ui.js";

const SIDES = ["left", "right"];
const sides = Object.fromEntries(SIDES.map((side) => [side, { model: "", loaded: null, said: "", messages: [], busy: false }]));
let system = "";
let settings = { temperature: 0, max_new_tokens: 256 };
let places = null;

async function build(panel, state) {
  for (const side of SIDES) {
    const loaded = state.loaded[side] || null;
    if (loaded !== sides[side].loaded) [sides[side].loaded, sides[side].said] = [loaded, ""];
    sides[side].model ||= loaded || state.models[SIDES.indexOf(side)] || "";
  }
  places = { sides: {}, faults: h("div") };
  const form = h("form", { class: "ask", id: "chat-form" });
  const box = h("textarea", { rows: 2, placeholder: t("question"), id: "chat-question" });
  const send = h("button", { type: "submit", class: "main", id: "chat-send" }, t("send"));
  const stop = h("button", { type: "button", id: "chat-stop", onclick: stopAll }, t("stop"));
  const clear = h("button", { type: "button", id: "chat-clear", onclick: clearAll }, t("clear"));
  const instruction = h("input", { type: "text", value: system, id: "chat-system", oninput: () => { system = instruction.value; } });
  const heat = numberInput("temperature", settings.temperature, { min: 0, max: 10, step: "any" });
  const most = numberInput("max_new_tokens", settings.max_new_tokens, { min: 1 });
  form.append(box, h("div", { class: "row" }, send, stop, clear, field("system_prompt", instruction),
    field("temperature", heat), field("max_new_tokens", most)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    settings = { temperature: heat.value === "" ? 0 : Number(heat.value), max_new_tokens: most.value };
    const question = box.value.trim();
    if (!question) return;
    box.value = "";
    askAll(question);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  panel.append(quiet("chat_about"), h("div", { class: "halves" }, SIDES.map((side) => sideElement(side, state))), places.faults, form);
}

function sideElement(side, state) {
  const model = textInput("model", sides[side].model, state.models);
  model.input.addEventListener("input", () => { sides[side].model = model.input.value; });
  const faults = h("div");
  const said = h("p", { class: "quiet", id: `chat-said-${side}` });
  const messages = h("div", { class: "messages", id: `chat-${side}` });
  const load = h("button", { type: "button", class: "main", id: `chat-load-${side}` }, t("load"));
  load.addEventListener("click", () => guarded(load, faults, async () => {
    said.textContent = t("loading");
    sides[side].loaded = null;
    try {
      const found = await ask("chat_load", { side, model: model.input.value });
      Object.assign(sides[side], { loaded: model.input.value, said: found.description, messages: [] });
    } finally {
      draw(side);
    }
  }));
  const unload = h("button", { type: "button", id: `chat-unload-${side}` }, t("unload"));
  unload.addEventListener("click", () => guarded(unload, faults, async () => {
    await ask("chat_unload", { side });
    Object.assign(sides[side], { loaded: null, said: "", messages: [] });
    draw(side);
  }));
  places.sides[side] = { said, messages, faults };
  const element = h("section", { class: "card" }, h("div", { class: "row" }, field(`model_${side}`, model), load, unload), said, faults, messages);
  draw(side);
  return element;
}

function draw(side) {
  const place = places?.sides[side];
  if (!place) return;
  const { loaded, said, messages } = sides[side];
  place.said.textContent = loaded ? said || loaded : t("nothing_loaded");
  place.messages.replaceChildren(...messages.map((message) => h("div", { class: `message ${message.role}` },
    h("div", { class: "text" }, message.content), message.note ? h("small", {}, message.note) : null)));
  place.messages.scrollTop = place.messages.scrollHeight;
}

function askAll(question) {
  const ready = SIDES.filter((side) => sides[side].loaded && !sides[side].busy);
  showFaults(places.faults, null);
  if (!ready.length) {
    places.faults.append(h("div", { class: "faults", role: "alert" }, t("load_first")));
    return;
  }
  for (const side of ready) askOne(side, question);
}

async function askOne(side, question) {
  const mine = sides[side];
  const { faults } = places.sides[side];
  showFaults(faults, null);
  mine.messages.push({ role: "user", content: question });
  const beginning = system.trim() ? [{ role: "system", content: system }] : [];
  const messages = [...beginning, ...mine.messages.map(({ role, content }) => ({ role, content }))];
  const answer = { role: "assistant", content: "", note: t("answering") };
  mine.messages.push(answer);
  mine.busy = true;
  draw(side);
  try {
    await askLines("chat_ask", { side, messages, ...settings }, (line) => {
      if (line.piece) answer.content += line.piece;
      if (line.done) answer.note = t("answered", { tokens: line.tokens, rate: short(line.tokens / Math.max(line.seconds, 1e-6), 3), reason: t(`reason_${line.done}`) });
      draw(side);
    });
  } catch (error) {
    mine.messages.splice(mine.messages.indexOf(answer) - 1, 2);
    draw(side);
    showFaults(places.sides[side].faults, error);
  } finally {
    mine.busy = false;
  }
}

async function stopAll() {
  for (const side of SIDES.filter((one) => sides[one].busy)) await ask("chat_stop", { side }).catch(() => {});
}

function clearAll() {
  for (const side of SIDES.filter((one) => !sides[one].busy)) {
    sides[side].messages = [];
    draw(side);
  }
}

export const chatPanel = { build };
