// Plan: a question to the planner, its table, and a layout as a launch command.

import {
  ask, copyButton, field, formOf, gb, guarded, h, numberInput, quiet, select, short, showFaults, spoken, t, textInput,
} from "./ui.js";

let form = {
  model: "7B", device: "910B", num_devices: 16, seq_length: 4096, global_batch_size: 256, method: "sft", lora_r: 16,
  dtype: "bf16",
};
let answer = null;
let row = null;
let place = "node";

function build(panel, state) {
  const faults = h("div");
  const result = h("section", { id: "plan-result" });
  const number = (name) => field(name, numberInput(name, form[name], { min: 1 }));
  const fields = h("form", { class: "fields", id: "plan-form" },
    field("model", textInput("model", form.model, [...state.sizes, ...state.models])),
    field("device", select("device", state.devices, form.device)),
    number("num_devices"), number("seq_length"), number("global_batch_size"),
    field("method", select("method", ["pretrain", "sft", "lora"], form.method, (one) => t(`method_${one}`))),
    number("lora_r"),
    field("dtype", select("dtype", ["bf16", "fp16", "fp32"], form.dtype)));
  const button = h("button", { type: "submit", class: "main", id: "plan-go" }, t("plan_go"));
  fields.append(button);
  const lora = fields.querySelector("[name=lora_r]").closest("label");
  const method = fields.querySelector("[name=method]");
  const showLora = () => lora.classList.toggle("hidden", method.value !== "lora");
  method.addEventListener("change", showLora);
  showLora();
  fields.addEventListener("submit", (event) => {
    event.preventDefault();
    form = formOf(fields);
    guarded(button, faults, async () => {
      result.replaceChildren(quiet("planning"));
      try {
        answer = await ask("plan", form);
        row = null;
      } catch (error) {
        answer = null;
        result.replaceChildren();
        throw error;
      }
      draw(result);
    });
  });
  panel.append(quiet("plan_about"), fields, faults, result);
  if (answer) draw(result);
}

function lines(sentences) {
  return sentences.map(spoken).join("\n");
}

function draw(result) {
  const most = Math.max(answer.device_memory, ...answer.rows.map((one) => one.memory.total));
  const legend = h("p", { class: "legend" }, answer.kinds.map((kind) =>
    h("span", {}, h("i", { class: `kind-${kind}` }), t(`kind_${kind}`))),
  h("span", {}, h("i", { class: "usable-mark" }), `${t("usable")} ${gb(answer.usable_memory)} GB`));
  const head = ["layout", "micro_batch", "sp", "dist_opt", "recompute", "memory", "gb", "fits", "step_time", "rate"];
  const table = h("table", { class: "plan-table", id: "plan-table" },
    h("thead", {}, h("tr", {}, head.map((key) => h("th", { class: `c-${key}` }, t(`plan_${key}`))))));
  const body = h("tbody");
  const command = h("section", { id: "plan-command", class: "card" });
  answer.rows.forEach((one, index) => body.append(tableRow(one, index, most, () => {
    row = index;
    for (const [at, line] of [...body.children].entries()) line.classList.toggle("is-picked", at === index);
    drawCommand(command);
  })));
  table.append(body);
  result.replaceChildren(h("pre", { class: "answer", id: "plan-answer" }, lines(answer.answer)), legend, command,
    h("div", { class: "wide" }, table), h("pre", { class: "notes" }, lines(answer.notes)));
  if (row === null) {
    command.append(quiet("pick_layout"));
  } else {
    body.children[row].classList.add("is-picked");
    drawCommand(command);
  }
}

function tableRow(one, index, most, picked) {
  const yes = (value) => (value ? t("yes") : "–");
  const cells = [
    one.label, one.micro_batch_size, yes(one.sequence_parallel), yes(one.use_distributed_optimizer),
    one.recompute_granularity ? t(`recompute_${one.recompute_granularity}`) : "–", bar(one, most), gb(one.memory.total),
    t(`verdict_${one.verdict}`), `${short(one.predicted_seconds.total, 3)} s`, short(one.tokens_per_second_per_device, 4),
  ];
  const line = h("tr", { class: `verdict-${one.verdict}`, tabindex: "0", id: `plan-row-${index}` },
    cells.map((cell) => h("td", {}, cell instanceof Node ? cell : String(cell))));
  line.addEventListener("click", picked);
  line.addEventListener("keydown", (event) => event.key === "Enter" && picked());
  return line;
}

function bar(one, most) {
  const parts = answer.kinds.map((kind) => h("i", {
    class: `kind-${kind}`, title: `${t(`kind_${kind}`)} ${gb(one.parts[kind])} GB`,
    style: { width: `${(100 * one.parts[kind]) / most}%` },
  }));
  const mark = h("b", { class: "usable-mark", style: { left: `${(100 * answer.usable_memory) / most}%` } });
  return h("div", { class: "bar" }, parts, mark);
}

async function drawCommand(element) {
  const faults = h("div");
  const text = h("pre", { class: "command", id: "plan-command-text" });
  const choose = (one) => {
    place = one;
    drawCommand(element);
  };
  const places = h("span", { class: "choice" }, ["node", "slurm", "volcano"].map((one) =>
    h("button", { type: "button", "aria-pressed": String(one === place), id: `place-${one}`, onclick: () => choose(one) }, t(`place_${one}`))));
  element.replaceChildren(h("div", { class: "row" }, h("h3", {}, answer.rows[row].label), places,
    copyButton(() => text.textContent)), text, faults);
  try {
    text.textContent = (await ask("plan_command", { ...form, row, place })).command;
  } catch (error) {
    showFaults(faults, error);
  }
}

export const planPanel = { build };
