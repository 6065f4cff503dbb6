// The page: tabs, the language, and which panel is shown.

import { chatPanel } from "./chat.js";
import { planPanel } from "./plan.js";
import { precisionPanel } from "./precision.js";
import { runsPanel } from "./runs.js";
import { startPanel } from "./start.js";
import { ask, currentLanguage, h, setLanguage, showFaults, t } from "./ui.js";

const PANELS = { runs: runsPanel, plan: planPanel, start: startPanel, chat: chatPanel, precision: precisionPanel };
const POLL = 2000;

let shown = null;

function wanted() {
  const name = location.hash.slice(1);
  return name in PANELS ? name : "runs";
}

async function show() {
  const name = wanted();
  document.documentElement.lang = currentLanguage() === "zh" ? "zh-CN" : "en";
  document.title = `${t(`tab_${name}`)} – qwen2-ascend`;
  document.getElementById("tabs").replaceChildren(...Object.keys(PANELS).map((one) =>
    h("a", { href: `#${one}`, role: "tab", id: `tab-${one}`, "aria-selected": String(one === name) }, t(`tab_${one}`))));
  const panel = document.getElementById("panel");
  panel.replaceChildren();
  panel.className = `panel-${name}`;
  shown = PANELS[name];
  const faults = h("div");
  panel.append(faults);
  try {
    const state = await ask("state");
    document.getElementById("place").textContent = Object.values(state.folders).join("  ");
    if (shown === PANELS[name]) await shown.build(panel, state);
  } catch (error) {
    showFaults(faults, error);
  }
}

async function poll() {
  if (shown?.poll && !document.hidden) {
    try {
      await shown.poll();
    } catch (error) {
      console.error(error);
    }
  }
  setTimeout(poll, POLL);
}

const language = document.getElementById("language");
language.value = currentLanguage();
language.addEventListener("change", () => {
  setLanguage(language.value);
  show();
});
window.addEventListener("hashchange", show);
show().then(() => setTimeout(poll, POLL));
