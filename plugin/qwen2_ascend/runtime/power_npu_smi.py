"""An Ascend NPU's power by npu-smi, the tool of its driver; torch_npu has no call for it.

What it prints depends on the chip (npu-smi's command references on hiascend.com, and its source):

| command | 910, 910B, 950 | 910C (two chips on a card) | 310P | 310, 310B |
|---|---|---|---|---|
| `info -t power -i CARD` | `NPU Real-time Power(W)`, then `Chip ID` | the same | the card's `Power Dissipation(W)`, then `Chip Name : MCU` | `Chip ID`, then `Rated Power Dissipation(W)`; the card's as on 310P |
| `info -t power -i CARD -c CHIP` | `NPU Real-time Power(W)` alone (950: takes no `-c`) | the same | nothing | the rated one |
| `info -t common -i CARD` | `Chip ID`, then `NPU Real-time Power(W)` | the same | no power of the chip; `Chip Name : mcu`, then `NPU Real-time Power(W)` | `Rated Power Dissipation(W)`; `Chip Name : MCU`, then `Power Dissipation(W)` |

A rated power is no measurement. On a card with several chips the table of `npu-smi info` shows
which of them have a figure of their own: on a 910C the second chip has `-`, the first one's figure
is the card's. None of this was ever run on hardware here.
"""  # noqa: E501

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from qwen2_ascend.runtime import diagnosis
from qwen2_ascend.runtime.power import (
    NoPowerSource,
    PowerReadingError,
    PowerSource,
    ask,
    counted_elsewhere,
    find_command,
    number,
    power_tool,
)

POWER_KEYS = ("NPU Real-time Power(W)", "Power Dissipation(W)")
COLUMNS = ("Chip Logic ID", "Chip Phy-ID", "Chip Name", "Chip ID", "Slot ID", "NPU ID")


class Chip(NamedTuple):
    """One row of `npu-smi info -m`."""

    card: int
    """NPU ID."""
    chip: int
    """Its number on the card."""
    logic: int
    """What torch_npu and ASCEND_RT_VISIBLE_DEVICES call it."""


class Powers(NamedTuple):
    """The figures of one card, in watts."""

    chips: dict[int, float]
    card: float | None
    """What the card's own controller measures."""


class Figure(NamedTuple):
    """One of the figures of a card; chips may share one."""

    card: int
    chip: int | None
    """None is the card's own."""

    def of(self, powers: Powers) -> float | None:
        """Its value, in watts."""
        return powers.card if self.chip is None else powers.chips.get(self.chip)

    def __str__(self) -> str:
        return f"NPU {self.card}" + ("" if self.chip is None else f" chip {self.chip}")


def open_npu_smi(local_rank: int, environ: Mapping[str, str] = os.environ) -> PowerSource:
    """The power of the chip, or of the card, that a process uses.

    Where processes share a figure, the first one of them counts it.

    Raises:
        NoPowerSource: npu-smi is not there, does not know the chip, or has no figure of it.
    """
    path = find_command("npu-smi", environ)
    try:
        mapping = parse_mapping(ask((path, "info", "-m")))
        own = _chip_of(mapping, local_rank, environ)
        card = [chip for chip in mapping if chip.card == own.card]
        with_own_figure = {own.chip}
        if len(card) > 1:
            table = parse_table(ask((path, "info")))
            with_own_figure = {c for (k, c), watts in table.items() if k == own.card and watts}
        command, figure = _find(path, own, with_own_figure, has_neighbours=len(card) > 1)
        source = power_tool(f"npu-smi, {figure}", command, partial(_watts, command, figure))
        source.read()
    except PowerReadingError as error:
        raise NoPowerSource(f"npu-smi: {error}.") from None
    for other in range(local_rank):
        chip = _chip_of(mapping, other, environ)
        if chip.card == own.card and (
            figure.chip is None or _sharer(chip.chip, with_own_figure) == figure.chip
        ):
            return counted_elsewhere(f"{source.name}, counted by local rank {other}")
    return source


def _find(
    path: str, own: Chip, with_own_figure: set[int], *, has_neighbours: bool
) -> tuple[tuple[str, ...], Figure]:
    """The first command that has a figure of the chip, and that figure.

    Raises:
        NoPowerSource: none has.
    """
    commands: list[tuple[str, ...]] = [
        ("-t", kind, "-i", str(own.card)) for kind in ("power", "common")
    ]
    if not has_neighbours:
        commands.insert(0, ("-t", "power", "-i", str(own.card), "-c", str(own.chip)))
    chip = _sharer(own.chip, with_own_figure)
    faults = []
    for words in commands:
        command = (path, "info", *words)
        try:
            powers = parse_power(ask(command), own.chip)
        except PowerReadingError as error:
            faults.append(str(error))
            continue
        if chip is not None and powers.chips.get(chip):
            return command, Figure(own.card, chip)
        if powers.card:
            return command, Figure(own.card, None)
        faults.append(f"`npu-smi info {' '.join(words)}` shows no power")
    raise NoPowerSource(f"npu-smi: NPU {own.card} chip {own.chip}: {'; '.join(faults)}.")


def _watts(command: Sequence[str], figure: Figure, text: str) -> float:
    """The figure in what the command printed.

    Raises:
        PowerReadingError: it is missing, or 0, which no device that is on draws.
    """
    watts = figure.of(parse_power(text, figure.chip or 0))
    if not watts:
        said = " ".join(("npu-smi", *command[1:]))
        what = "no power" if watts is None else "0 W"
        raise PowerReadingError(f"`{said}` shows {what} of {figure}")
    return watts


def _sharer(chip: int, with_own_figure: set[int]) -> int | None:
    """The chip whose figure is also that of `chip`: itself, or the last one before it."""
    return max((other for other in with_own_figure if other <= chip), default=None)


def _chip_of(mapping: Sequence[Chip], index: int, environ: Mapping[str, str]) -> Chip:
    """The chip that torch_npu calls `index` in this environment."""
    logic = index
    visible = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        if fault := diagnosis.visible_devices_fault(environ, None):
            raise NoPowerSource(f"npu-smi: {fault}")
        numbers = [int(word) for word in visible.split(",")]
        if index >= len(numbers):
            raise NoPowerSource(f"npu-smi: ASCEND_RT_VISIBLE_DEVICES={visible} has no {index}.")
        logic = numbers[index]
    for chip in mapping:
        if chip.logic == logic:
            return chip
    known = ", ".join(str(chip.logic) for chip in mapping) or "none"
    raise NoPowerSource(f"npu-smi: `npu-smi info -m` has no device {logic}, only {known}.")


def parse_mapping(text: str) -> list[Chip]:
    """The chips of `npu-smi info -m`, without the cards' controllers.

    The columns differ: a 910C also has Chip Phy-ID; a 950 has Slot ID and no Chip Logic ID, and
    there the NPU ID is the device's number.
    """
    columns: list[str] = []
    chips = []
    for line in text.splitlines():
        if "NPU ID" in line and "Chip ID" in line:
            columns = re.findall("|".join(COLUMNS), line)
            continue
        row = dict(zip(columns, line.split(), strict=False))
        logic = row.get("Chip Logic ID", row.get("NPU ID", ""))
        words = (row.get("NPU ID", ""), row.get("Chip ID", ""), logic)
        if all(word.isdigit() for word in words) and row.get("Chip Name", "").lower() != "mcu":
            chips.append(Chip(*(int(word) for word in words)))
    return chips


def parse_power(text: str, asked_chip: int = 0) -> Powers:
    """The figures of `npu-smi info -t power` and `-t common`, of one card.

    Args:
        text: what it printed.
        asked_chip: whose figure it is where nothing says whose: with -c, and on a 950.
    """
    chips: dict[int, float] = {}
    card = None
    for block in _blocks(text):
        watts = next(
            (n for key in POWER_KEYS if (n := number(block.get(key, ""))) is not None), None
        )
        if watts is None:
            continue
        name = block.get("Chip Name", "").lower()
        if name == "mcu":
            card = watts
        elif not name:  # else another processor of the card, 3559
            chip = block.get("Chip ID", "")
            chips[int(chip) if chip.isdigit() else asked_chip] = watts
    return Powers(chips, card)


def _blocks(text: str) -> Iterator[dict[str, str]]:
    """`key : value` lines between empty ones; a key that comes again also begins a block.

    A chip's number stands before its figures, or after them.
    """
    block: dict[str, str] = {}
    for line in [*text.splitlines(), ""]:
        key, colon, value = (part.strip() for part in line.partition(":"))
        if (not line.strip() or key in block) and block:
            yield block
            block = {}
        if colon:
            block[key] = value


def parse_table(text: str) -> dict[tuple[int, int], float | None]:
    """(card, chip) -> watts from the table of `npu-smi info`; None where it has - or NA.

    Each chip has two lines of three cells: NPU and name, health, power and more; then chip, bus,
    usage.
    """
    found: dict[tuple[int, int], float | None] = {}
    above: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        is_row = line.startswith("|") and len(cells) == 3 and all(cells) and cells[0][0].isdigit()
        if not is_row:
            above = None if line.startswith("|") else above
        elif above is None:
            above = [cells[0][0], cells[2][0]]
        else:
            found[int(above[0]), int(cells[0][0])] = number(above[1])
            above = None
    return found
