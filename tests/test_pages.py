"""The pages that users read: links lead somewhere, tolerances are those of the tests."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from distributed import parity_worker, train_worker
from finetuning import adapter_worker, deepspeed_worker, finetune_worker, lora_worker
from qwen2_ascend import cli, plan
from qwen2_ascend.planning import report
from real import real_worker

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
COMMAND = re.compile(
    r"(?:qwen2-ascend|python tools/(?=benchmark)) ?((?:benchmark(?:\.py)? )?[\w-]+)"
)
"""A command of a page's block up to its name; launchers' are tested by tests/finetuning."""
ALLOWED = {
    "logits of a small model": (parity_worker.FP32_TOLERANCE, parity_worker.FP64_TOLERANCE),
    "logits of a model with hidden size 512": (parity_worker.FP64_TOLERANCE,),
    "logits of Qwen2.5-Coder-0.5B": (real_worker.RELATIVE_TOLERANCE,),
    "losses of 4 steps at TP1": (train_worker.TOLERANCE,),
    "the same at another layout": (train_worker.MOVED_TOLERANCE,),
    "fine-tuning: losses of 4 steps": (finetune_worker.TOLERANCE,),
    "LoRA: losses of 4 steps": (lora_worker.TOLERANCE,),
    "adapter folders": (adapter_worker.TOLERANCE,),
    "DeepSpeed ZeRO": (deepspeed_worker.LOSS_TOLERANCE,),
    "LoRA by ZeRO": (deepspeed_worker.LOSS_TOLERANCE,),
}
"""What the tests allow, by the beginning of a claim in docs/evidence.md."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken(page))


def broken(page: Path) -> Iterator[str]:
    """The links of a page to files or headings that are not there."""
    for target in LINK.findall(without_commands(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in anchors(file)):
            yield target


def anchors(page: Path) -> set[str]:
    """The headings of a page as links spell them: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", without_commands(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_commands(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_flags_of_their_help(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # benchmark's help sets a handler
    monkeypatch.setattr(sys, "argv", sys.argv)
    blocks = re.findall(r"^```.*?^```", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if found := COMMAND.match(line.removeprefix("OMP_NUM_THREADS=1 ")):
            name = found[1].replace(".py", "")
            assert set(FLAG.findall(line)) <= helped(name), line


@lru_cache
def helped(name: str) -> set[str]:
    """The flags in the help of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        cli._dispatch([*name.split(), "--help"])
    return set(FLAG.findall(out.getvalue()))


@pytest.mark.parametrize("claim", ALLOWED)
def test_the_page_of_evidence_has_the_tolerances_of_the_tests(claim: str) -> None:
    lines = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {claim}")]
    found = [float(number) for number in re.findall(r"\d+e-\d+", row.split("|")[4])]
    assert tuple(found) == ALLOWED[claim]


def test_the_pages_have_the_answers_of_the_planner() -> None:
    said = report.answer(plan("72B", 16, device="910B"))
    (quoted,) = re.findall(r"The fewest it fits on: [^.]+[.]\d GB [(][^.]+", read("README.md"))
    assert quoted.removesuffix(" ") in said
    devices, memory, layout = re.findall(r"(\d+) devices, (\S+ GB) [(]([^,]+),", said)[0]
    assert all(word in read("README.zh-CN.md") for word in (f"{devices} 卡", memory, layout))

    page = read("docs/planning.md")
    (example,) = re.findall(r"## An example\n.*?```\n(.*?)```", page, re.DOTALL)
    lines = report.text(plan("14B", 8), top=20, commands=0).splitlines()
    for line in filter(None, example.splitlines()):
        cells = re.split(r"  +", line)
        assert any(is_part(cells, re.split(r"  +", own)) for own in lines), line


def is_part(some: list[str], cells: list[str]) -> bool:
    """Whether `cells` with some left out are `some`."""
    left = iter(cells)
    return all(cell in left for cell in some)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
