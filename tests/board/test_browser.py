"""The page in a real browser: every tab opened, a run followed, a fine-tune started, watched and
stopped, a chat answered, a plan copied; and names that are HTML stay names.

Chromium is Debian's (`make browser` installs it); Playwright drives it. With BOARD_SCREENSHOTS set
to a folder, a picture of every tab in both languages is written there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra board is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect  # noqa: E402

from board.serving import Served, row, serving, write_run  # noqa: E402
from inference.worlds import model_with_tokenizer  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
expect.set_options(timeout=60_000)  # of a machine that does other things too
TABS = ("runs", "plan", "start", "chat", "precision")
SLOW = 400_000
"""Milliseconds that a process may take to start on a busy machine."""
HTML_NAME = "<img src=x onerror=document.title='owned'>"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: make browser"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, a model, chats and a report."""
    folder = tmp_path_factory.mktemp("board") / "out"
    described = {
        "flags": {"--lr": 1e-4, "--seq-length": 4096},
        "environment": {"torch": "2.13.0"},
        "train_iters": 400,
        "planned_memory_bytes": 33_000_000_000,
        "peak_flops": 353.9e12,
    }
    write_run(folder / "base", 400, **described)
    write_run(folder / "again", 400, 0.002, **described)
    changed = {**described, "flags": {"--lr": 3e-4, "--seq-length": 4096}}
    write_run(folder / "other-lr", 300, 0.4, **changed)
    write_run(folder / HTML_NAME, 50)
    broken = write_run(folder / "broken", 30)
    with (broken / "metrics.jsonl").open("ab") as out:
        out.write(b"<script>document.title='owned'</script>\n")
    (folder / "base" / "run.log").write_text("the log of base\n<b>bold</b>\n")
    model_with_tokenizer(folder / "model", vocab_size=400, max_position_embeddings=512)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(64)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "align").mkdir()
    (folder / "align" / "report.json").write_text(json.dumps(report()))
    return folder


def report() -> dict:
    """A report as align_qwen2.py writes it, of two layers, of which one sublayer parts."""
    from qwen2_ascend.alignment.sublayers import sublayers

    def error(size: float) -> dict:
        return {"mean": size, "worst": 2 * size}

    cells = []
    for number, sublayer in enumerate(sublayers(2)):
        parted = sublayer.name == "layers.1.key"
        cells.append(
            {
                "name": sublayer.name,
                "own": error(1e-2 if parted else 1e-7),
                "noise": error(1e-7),
                "total": error(1e-6),
                "total_noise": error(1e-6),
                "ratio": 1e5 if parted else 0.5 + number % 3,
                "parted": parted,
                "histogram": {"edges": [1e-8, 1e-7, 1e-6], "counts": [3, 5]},
            }
        )
    return {
        "aligned": False,
        "verdict": "PARTED at layer 1, key first: look at linear_qkv.",
        "first": "layers.1.key",
        "origin": "fp32, TP2 PP1",
        "precision": "fp32",
        "noise_factor": 4.0,
        "sublayers": cells,
    }


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """An English page; it may load nothing from elsewhere and make no error."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1400, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=served.url)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda said: faults.append(said.text) if "Content Security" in said.text else None,
    )
    page.on(
        "request",
        lambda request: None if request.url.startswith(served.url) else faults.append(request.url),
    )
    page.set_default_timeout(30_000)
    yield page
    context.close()
    assert not faults


def opened(page: Page, served: Served, tab: str) -> Page:
    page.goto(f"{served.url}/#{tab}")
    expect(page.locator(f"#tab-{tab}")).to_have_attribute("aria-selected", "true")
    return page


def wait_until_drawn(page: Page, chart: str) -> None:
    """Waits for a chart's curve: colours of a curve in its canvas."""
    page.wait_for_function(
        """(id) => { const canvas = document.querySelector(`#chart-${id} canvas`);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 0; i < data.length; i += 4)
          if (data[i + 3] > 200 && Math.max(data[i], data[i+1], data[i+2])
              - Math.min(data[i], data[i+1], data[i+2]) > 60) return true;
        return false; }""",
        arg=chart,
    )


def test_runs_are_drawn_and_followed(page: Page, served: Served, folder: Path) -> None:
    live = write_run(folder / "live", 20)
    opened(page, served, "runs")
    line = page.locator("[data-run='out/live']")
    expect(line).to_contain_text("20")
    expect(line).to_contain_text("live")
    for chart in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_bytes"):
        wait_until_drawn(page, chart)
    with (live / "metrics.jsonl").open("a") as out:
        out.write(json.dumps(row(21)) + "\n")
    expect(line).to_contain_text("21")  # without a reload
    page.locator("#run-list button", has_text="out/base").click()
    expect(page.locator("#run-log")).to_contain_text("<b>bold</b>")
    shutil.rmtree(live)
    expect(line).to_have_count(0)


def test_names_and_lines_that_are_html_stay_text(page: Page, served: Served) -> None:
    opened(page, served, "runs")
    expect(page.locator("#run-list")).to_contain_text(HTML_NAME)
    expect(page.locator("#run-notes")).to_contain_text("<script>")
    expect(page.locator("#run-notes")).to_contain_text("1 line(s) of metrics.jsonl are no rows")
    assert page.locator("#panel img, #panel script").count() == 0
    assert "owned" not in page.title()


def test_two_runs_are_compared(page: Page, served: Served) -> None:
    opened(page, served, "runs")
    page.locator("#pair-first").select_option("out/base")
    page.locator("#pair-second").select_option("out/again")
    page.locator("#select-all").click()
    page.locator("#pair-noise").click()
    expect(page.locator("#noise-verdict")).to_contain_text("out/other-lr: outside of the band from")
    page.locator("#pair-second").select_option("out/other-lr")
    page.locator("#pair-compare").click()
    differing = page.locator("#differences-configuration tr.differs")
    expect(differing).to_have_count(1)
    expect(differing).to_contain_text("--lr")


def test_a_plan_is_copied(page: Page, served: Served) -> None:
    opened(page, served, "plan")
    page.locator("[name=model]").fill("7B")
    page.locator("[name=num_devices]").fill("16")
    page.locator("#plan-go").click()
    page.locator("#plan-row-0").click()
    text = page.locator("#plan-command-text")
    expect(text).to_contain_text("torchrun --nnodes 2")
    expect(text).to_contain_text("launch/finetune_qwen2.py")
    page.locator("#plan-command .copy").click()
    expect(page.locator("#plan-command .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text.inner_text()
    page.locator("#place-slurm").click()
    expect(text).to_contain_text("#SBATCH --nodes=2")
    page.locator("#place-volcano").click()
    expect(text).to_contain_text("replicas: 2")
    widths = page.locator("#plan-row-0 .bar i").evaluate_all("all => all.map(x => x.clientWidth)")
    assert sum(width > 0 for width in widths) >= 4  # kinds of memory
    page.locator("[name=seq_length]").fill("1000000")
    page.locator("#plan-go").click()
    expect(page.locator(".faults")).to_contain_text("max_position_embeddings")


def test_a_cell_of_a_report_shows_its_sublayer(page: Page, served: Served) -> None:
    opened(page, served, "precision")
    expect(page.locator("#verdict")).to_contain_text("PARTED at layer 1, key")
    expect(page.locator("#heat .cell")).to_have_count(32)
    page.locator("[data-cell='layers.0.gate']").click()
    detail = page.locator("#cell-detail")
    expect(detail).to_contain_text("layer 0, gate")
    expect(detail).to_contain_text("own error")
    expect(detail.locator("#histogram .bars i").first).to_be_visible()


def test_two_models_answer_and_stream(page: Page, served: Served) -> None:
    opened(page, served, "chat")
    for side in ("left", "right"):
        page.locator(f"section:has(#chat-load-{side}) [name=model]").fill("out/model")
        page.locator(f"#chat-load-{side}").click()
        expect(page.locator(f"#chat-said-{side}")).to_contain_text("Hugging Face", timeout=SLOW)
    page.evaluate(
        """() => { window.lengths = []; new MutationObserver(() => window.lengths.push(
        document.querySelector("#chat-left .assistant .text")?.textContent.length || 0))
        .observe(document.getElementById("chat-left"), {childList: true, subtree: true}); }"""
    )
    page.locator("[name=max_new_tokens]").fill("40")
    page.locator("#chat-question").fill("Who are <b>you</b>?")
    page.locator("#chat-send").click()
    for side in ("left", "right"):
        answer = page.locator(f"#chat-{side} .assistant")
        expect(answer).to_contain_text("tokens,", timeout=SLOW)
        expect(page.locator(f"#chat-{side} .user")).to_contain_text("<b>you</b>")
    texts = [
        page.locator(f"#chat-{side} .assistant .text").inner_text() for side in ("left", "right")
    ]
    assert texts[0] and texts[0] == texts[1]  # greedy, the same model
    assert len(set(page.evaluate("window.lengths"))) > 3  # piece by piece
    page.locator("#chat-unload-right").click()
    page.locator("[name=max_new_tokens]").fill("400")
    page.locator("#chat-question").fill("And on?")
    page.locator("#chat-send").click()
    expect(page.locator("#chat-left .assistant")).to_have_count(2)
    page.locator("#chat-stop").click()
    expect(page.locator("#chat-left .assistant").last).to_contain_text(
        re.compile("stopped|complete|cut"), timeout=SLOW
    )
    page.locator("#chat-unload-left").click()
    expect(page.locator("#chat-said-left")).to_contain_text("No model is loaded")
    assert not served.board.talkers.loaded()


def test_a_fine_tune_is_started_watched_and_stopped(
    page: Page, served: Served, folder: Path
) -> None:
    opened(page, served, "start")
    page.locator("[name=model]").fill("out/model")
    page.locator("[name=data]").fill("out/chats.jsonl")
    page.locator("#start-preview").click()
    expect(page.locator("#preview pre.chat")).to_have_count(3, timeout=SLOW)
    expect(page.locator("#preview mark").nth(1)).to_contain_text("yes")
    page.locator("[name=save]").fill("../escaped")
    page.locator("#start-go").click()
    expect(page.locator(".faults")).to_contain_text("outside of the folders")
    page.locator("[name=save]").fill("out/tuned")
    numbers = {"epochs": "400", "lr": "1e-3", "seq_length": "64"}
    numbers |= {"global_batch_size": "4", "processes": "2"}
    for name, value in numbers.items():
        page.locator(f"[name={name}]").fill(value)
    page.locator("#start-suggest").click()
    expect(page.locator("#suggested")).to_contain_text("on the fullest CPU")
    page.locator("#start-show").click()
    expect(page.locator("#start-command-text")).to_contain_text("torchrun --standalone")
    page.locator("#start-go").click()
    state = page.locator("#job-state")
    expect(state).to_have_attribute("data-state", "running")
    assert served.ask("start", **json.loads(form_of(page)))["faults"]  # one at a time
    expect(page.locator("#job-log")).to_contain_text("iteration 3/", timeout=SLOW)
    expect(page.locator("#job-progress")).to_contain_text(re.compile(r"[1-9]\d* / \d{3,}"))
    page.locator("#start-stop").click()
    expect(state).to_have_attribute("data-state", "stopped", timeout=SLOW)
    expect(page.locator("#job-log")).to_contain_text("was told to stop (SIGTERM)")
    run = folder / "tuned" / "run"
    saved = list(run.glob("iter_*"))
    assert len(saved) == 1 and (run / "run.json").is_file()
    opened(page, served, "runs")
    page.locator("#run-list button", has_text="out/tuned/run").click()
    expect(page.locator("#checkpoints")).to_contain_text(saved[0].name)
    expect(page.locator("#run-log")).to_contain_text("saved")
    page.locator("#detail-environment summary").click()
    expect(page.locator("#detail-environment")).to_contain_text("megatron-core")


def form_of(page: Page) -> str:
    """What the Start form holds, as JSON."""
    return page.evaluate(
        """() => JSON.stringify(Object.fromEntries([...document.querySelectorAll(
        "#start-form [name]")].map((x) => [x.name, x.type === "checkbox" ? x.checked : x.value]
        )))"""
    )


def test_the_language_is_the_browsers_and_can_be_changed(browser: Browser, served: Served) -> None:
    context = browser.new_context(locale="zh-CN", viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    for tab in TABS:
        opened(page, served, tab)
        expect(page.locator(f"#tab-{tab}")).to_have_text(re.compile("[\u4e00-\u9fff]"))
        expect(page.locator("#panel")).to_contain_text(re.compile("[\u4e00-\u9fff]"))
    opened(page, served, "plan")
    page.locator("#plan-go").click()
    for line in page.locator("#plan-answer").inner_text().splitlines():
        assert re.search("[\u4e00-\u9fff]", line), line
    page.locator("#language").select_option("en")
    expect(page.locator("#tab-runs")).to_have_text("Runs")
    page.reload()
    expect(page.locator("#tab-runs")).to_have_text("Runs")  # it is remembered
    context.close()


@pytest.mark.skipif("BOARD_SCREENSHOTS" not in os.environ, reason="only for docs/board.md")
def test_pictures_of_every_tab_in_both_languages(browser: Browser, served: Served) -> None:
    out = Path(os.environ["BOARD_SCREENSHOTS"])
    out.mkdir(parents=True, exist_ok=True)
    for language in ("en-GB", "zh-CN"):
        context = browser.new_context(locale=language, viewport={"width": 1280, "height": 800})
        page = context.new_page()
        for tab in TABS:
            opened(page, served, tab)
            if tab == "plan":
                page.locator("#plan-go").click()
                page.locator("#plan-row-0").click()
                expect(page.locator("#plan-command-text")).to_contain_text("torchrun")
            time.sleep(1)
            page.screenshot(path=out / f"{tab}-{language[:2]}.png")
        context.close()


def test_the_command_serves_and_ends(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen2_ascend.cli", "board", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", line)
            with urllib.request.urlopen(line.strip(), timeout=60) as answer:
                assert b"<title>" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert not list(tmp_path.iterdir())
