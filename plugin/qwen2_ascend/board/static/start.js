// Start: a form becomes a fine-tuning run; its command, its log, its progress, its end.

import { Chart } from "./chart.js";
import {
  ask, checkbox, copyButton, field, formOf, guarded, h, numberInput, quiet, replaceAround, select, short, t, textInput,
} from "./ui.js";

let form = {
  model: "", data: "", save: "", method: "sft", lora_r: 16, lora_alpha: 32, processes: 1, tp: 1, pp: 1,
  sequence_parallel: false, distributed_optimizer: false, recompute: "none", micro_batch_size: 1, global_batch_size: 8,
  seq_length: 512, epochs: 3, lr: "1e-5", dtype: "fp32", device: "auto", pack: true, save_hf: true, save_interval: 0,
  planner_device: "CPU",
};
let preview = null;
let places = null;

async function build(panel, state) {
  form.model ||= state.models.find((one) => one.endsWith("/hf")) || state.models[0] || "";
  form.data ||= state.data.find((one) => one.includes("chat")) || "";
  form.save ||= `${Object.keys(state.folders)[0]}/tuned`;
  places = { faults: h("div"), preview: h("section", { id: "preview" }), command: h("section", { id: "start-command" }), job: h("section", { id: "job" }), chart: new Chart(t("chart_loss")) };
  const fields = formElement(state);
  fields.addEventListener("input", () => { form = formOf(fields); });
  fields.addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(places.go, places.faults, async () => drawJob(await ask("start", formOf(fields))));
  });
  panel.append(quiet("start_about"), fields, places.faults, places.preview, places.command, places.job);
  if (preview) drawPreview();
  await poll();
}

function formElement(state) {
  const choice = (name, values, prefix = null) =>
    field(name, select(name, values, form[name], (one) => (prefix ? t(`${prefix}${one}`) : one)));
  const number = (name, attributes) => field(name, numberInput(name, form[name], attributes));
  const tick = (name) => field(name, checkbox(name, form[name]));
  const fields = h("form", { id: "start-form" });
  const button = (key, action, type = "button") => {
    const element = h("button", { type, id: `start-${key}` }, t(`start_${key}`));
    if (action) element.addEventListener("click", () => guarded(element, places.faults, () => action(fields)));
    return element;
  };
  places.go = button("go", null, "submit");
  places.go.classList.add("main");
  places.stop = button("stop", async () => drawJob(await ask("stop")));
  fields.append(
    fieldset("what", field("model_folder", textInput("model", form.model, state.models)),
      field("data_file", textInput("data", form.data, state.data)), button("preview", askPreview),
      field("save_folder", textInput("save", form.save))),
    fieldset("how", choice("method", ["sft", "lora"], "method_"),
      number("lora_r", { min: 1 }), number("lora_alpha", { step: "any" }), number("epochs", { step: "any" }), field("lr", h("input", { name: "lr", value: form.lr, type: "text" })),
      number("seq_length", { min: 2 }), number("micro_batch_size", { min: 1 }), number("global_batch_size", { min: 1 }),
      choice("dtype", ["fp32", "bf16", "fp16"]), tick("pack"), tick("save_hf"), number("save_interval", { min: 0 })),
    fieldset("where", choice("device", ["auto", "npu", "cuda", "cpu"]), number("processes", { min: 1 }),
      number("tp", { min: 1 }), number("pp", { min: 1 }), tick("sequence_parallel"), tick("distributed_optimizer"),
      choice("recompute", ["none", "selective", "full"], "recompute_"),
      choice("planner_device", state.devices), button("suggest", suggest)),
    h("div", { class: "row" }, button("show", showCommand), places.go, places.stop));
  const method = fields.querySelector("[name=method]");
  const showLora = () => {
    for (const name of ["lora_r", "lora_alpha"]) fields.querySelector(`[name=${name}]`).closest("label").classList.toggle("hidden", method.value !== "lora");
  };
  method.addEventListener("change", showLora);
  showLora();
  return fields;
}

function fieldset(key, ...children) {
  return h("fieldset", {}, h("legend", {}, t(`start_part_${key}`)), h("div", { class: "fields" }, children));
}

async function askPreview(fields) {
  places.preview.replaceChildren(quiet("rendering"));
  try {
    preview = await ask("preview", formOf(fields));
  } catch (error) {
    preview = null;
    places.preview.replaceChildren();
    throw error;
  }
  drawPreview();
}

function drawPreview() {
  places.preview.replaceChildren(h("p", {}, h("mark", {}, t("trained_on")), ` ${t("preview_about", { format: preview.format })}`),
    ...preview.bad.map((fault) => h("div", { class: "fault" }, fault)),
    h("div", { class: "chats" }, preview.chats.map((pieces) => {
      const count = (trained) => pieces.filter((one) => one.trained === trained).reduce((sum, one) => sum + one.tokens, 0);
      return h("div", { class: "card" }, h("small", {}, t("preview_tokens", { trained: count(true), all: count(true) + count(false) })),
        h("pre", { class: "chat" }, pieces.map((one) => (one.trained ? h("mark", {}, one.text) : one.text))));
    })));
}

/** Takes the planner's best layout for the form's model, device and number of processes. */
async function suggest(fields) {
  const now = formOf(fields);
  const found = await ask("plan", { ...now, device: now.planner_device, num_devices: now.processes });
  const best = found.rows[0];
  const set = (name, value) => {
    const control = fields.querySelector(`[name=${name}]`);
    if (control.type === "checkbox") control.checked = value;
    else control.value = value;
  };
  set("tp", best.tensor_model_parallel_size);
  set("pp", best.pipeline_model_parallel_size);
  set("sequence_parallel", best.sequence_parallel);
  set("distributed_optimizer", best.use_distributed_optimizer);
  set("recompute", best.recompute_granularity || "none");
  set("micro_batch_size", best.micro_batch_size);
  form = formOf(fields);
  const what = t("suggested", { layout: best.label, gb: (best.memory.total / 1e9).toPrecision(3), device: now.planner_device, verdict: t(`verdict_${best.verdict}`) });
  places.command.replaceChildren(h("p", { id: "suggested" }, what, best.num_layers_per_virtual_pipeline_stage ? ` ${t("no_vpp")}` : ""));
}

async function showCommand(fields) {
  const found = await ask("order", formOf(fields));
  const text = h("pre", { class: "command", id: "start-command-text" }, found.command);
  places.command.replaceChildren(h("div", { class: "row" }, quiet("in_folder", { folder: found.cwd }), copyButton(() => found.command)), text);
}

async function poll() {
  const mine = places;
  const job = await ask("job");
  if (mine === places) drawJob(job);
  if (job.run && mine === places) await drawCurve(job.run);
}

async function drawCurve(run) {
  const mine = places;
  const found = (await ask("curves", { runs: [run], series: ["loss", "validation_loss"] })).runs[run];
  if (mine !== places || !found.curves) return;
  places.chart.show([{ label: run, colour: "#1f77b4", points: found.curves.loss, shade: true },
    { label: t("validation"), colour: "#d9822b", points: found.curves.validation_loss, dashed: true }], { none: t("no_steps") });
}

function drawJob(job) {
  const isUnderWay = ["running", "stopping"].includes(job.state);
  places.go.disabled = isUnderWay;
  places.stop.disabled = job.state !== "running";
  if (job.state === "none") {
    places.job.replaceChildren();
    return;
  }
  const { iteration, train_iters: total, loss } = job.progress;
  const text = h("pre", { class: "log", id: "job-log" }, job.log_lines.join("\n"));
  replaceAround(places.job, h("div", { class: "row" }, h("h3", {}, job.run), h("span", { class: `state state-${job.state}`, id: "job-state", "data-state": job.state }, t(`state_${job.state}`, { status: job.status }))),
    h("div", { class: "row" }, h("progress", { max: total || 1, value: iteration || 0 }), h("span", { id: "job-progress" }, `${iteration ?? 0} / ${total ?? "?"}`), h("span", { class: "quiet" }, loss === null ? "" : `${t("column_loss")} ${short(loss)}`)),
    h("pre", { class: "command" }, job.command), h("div", { class: "halves" }, places.chart.element, text));
}

export const startPanel = { build, poll };
