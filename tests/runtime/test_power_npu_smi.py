"""npu-smi's output in every form it is documented in, as written here by hand; none was recorded.

A figure that is not the chip's own measurement must never be taken for it: rated power, the
controller's where the chip has one, a 0 or NA, and one figure twice on a card with two chips.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen2_ascend.runtime.power import NoPowerSource, PowerReadingError
from qwen2_ascend.runtime.power_npu_smi import (
    Chip,
    Powers,
    open_npu_smi,
    parse_mapping,
    parse_power,
    parse_table,
)


def lines(*pairs: tuple[str, object] | None) -> str:
    """npu-smi's layout: a tab, the key in 30 columns, and its value; None is an empty line."""
    return "".join("\n" if pair is None else f"\t{pair[0]:<30} : {pair[1]}\n" for pair in pairs)


def head(card: int, chips: int) -> tuple[tuple[str, object], ...]:
    return ("NPU ID", card), ("Chip Count", chips)


REAL, RATED, CARDS = "NPU Real-time Power(W)", "Rated Power Dissipation(W)", "Power Dissipation(W)"

POWER_OF_A_CHIP = lines((REAL, 9.1))
POWER_910B = lines(*head(0, 1), None, (REAL, 93.1), ("Chip ID", 0), None)
POWER_910C_BOTH = lines(
    *head(0, 2), None, (REAL, 166.5), ("Chip ID", 0), None, (REAL, 161.5), ("Chip ID", 1), None
)
POWER_310P = lines(*head(4, 1), None, (CARDS, 42.8), ("Chip Name", "MCU"), None)
POWER_310 = lines(
    *head(1, 2),
    None,
    ("Chip ID", 0),
    (RATED, 8.0),
    None,
    ("Chip ID", 1),
    (RATED, 8.0),
    None,
    (CARDS, 13.4),
    ("Chip Name", "MCU"),
    None,
)
POWER_950 = lines(("NPU ID", 1), (REAL, 203.3), None)
COMMON_910B = lines(
    *head(0, 1),
    None,
    ("Chip ID", 0),
    ("Memory Usage Rate(%)", 0),
    ("HBM Usage Rate(%)", 5),
    ("Aicore Usage Rate(%)", 0),
    ("Temperature(C)", 46),
    (REAL, 69.0),
    None,
    ("Chip Name", "mcu"),
    ("Temperature(C)", 41),
    (REAL, 13.4),
)
COMMON_310P = lines(
    *head(4, 1),
    None,
    ("Chip ID", 0),
    ("Aicore Usage Rate(%)", 0),
    ("Temperature(C)", 43),
    None,
    ("Chip Name", "mcu"),
    ("Temperature(C)", 41),
    (REAL, 13.4),
)
COMMON_310 = lines(
    *head(0, 1),
    None,
    ("Chip ID", 0),
    ("Temperature(C)", 43),
    (RATED, 8.0),
    None,
    ("Chip Name", "MCU"),
    ("Temperature(C)", 41),
    (CARDS, 12.2),
    None,
    ("Chip Name", "3559"),
    ("Temperature(C)", 40),
    (CARDS, 3.3),
)
NOT_KNOWN = lines(*head(0, 1), None, (REAL, "NA"), ("Chip ID", 0), None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (POWER_OF_A_CHIP, Powers({3: 9.1}, None)),
        (POWER_910B, Powers({0: 93.1}, None)),
        (POWER_910C_BOTH, Powers({0: 166.5, 1: 161.5}, None)),
        (POWER_310P, Powers({}, 42.8)),
        (POWER_310, Powers({}, 13.4)),
        (POWER_950, Powers({3: 203.3}, None)),
        (COMMON_910B, Powers({0: 69.0}, 13.4)),
        (COMMON_310P, Powers({}, 13.4)),
        (COMMON_310, Powers({}, 12.2)),
        (NOT_KNOWN, Powers({}, None)),
        (POWER_910B.replace("\t", "        "), Powers({0: 93.1}, None)),
        ("Error parameter of -t\n", Powers({}, None)),
        ("", Powers({}, None)),
    ],
)
def test_power_is_the_chips_own_or_the_cards_never_the_rated_one(text: str, found: Powers) -> None:
    assert parse_power(text, asked_chip=3) == found


def columns(*rows: tuple[object, ...]) -> str:
    return "".join("\t" + "".join(f"{cell!s:<31}" for cell in row) + "\n" for row in rows)


HEAD = ("NPU ID", "Chip ID", "Chip Logic ID")
MAP_910B = columns(
    (*HEAD, "Chip Name"),
    (0, 0, 0, "Ascend 910B3"),
    (0, 1, "-", "Mcu"),
    (1, 0, 1, "Ascend 910B3"),
    (1, 1, "-", "Mcu"),
)
MAP_910C = columns(
    (*HEAD, "Chip Phy-ID", "Chip Name"),
    (0, 0, 0, 0, "Ascend910"),
    (0, 1, 1, 1, "Ascend910"),
    (0, 2, "-", "-", "Mcu"),
    (1, 0, 2, 2, "Ascend910"),
    (1, 1, 3, 3, "Ascend910"),
)
MAP_310P = columns((*HEAD, "Chip Name"), (4, 0, 0, "Ascend 310P3"), (4, 1, "-", "Mcu"))
MAP_950 = columns(
    ("NPU ID", "Slot ID", "Chip ID", "Chip Phy-ID", "Chip Name"),
    (0, 1, 0, 0, "Ascend950PR"),
    (1, 2, 0, 1, "Ascend950PR"),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (MAP_910B, [Chip(0, 0, 0), Chip(1, 0, 1)]),
        (MAP_910C, [Chip(0, 0, 0), Chip(0, 1, 1), Chip(1, 0, 2), Chip(1, 1, 3)]),
        (MAP_310P, [Chip(4, 0, 0)]),
        (MAP_950, [Chip(0, 0, 0), Chip(1, 0, 1)]),
        ("dcmi module initialize failed. ret is -8005\n", []),
    ],
)
def test_devices_are_found_by_the_number_that_torch_npu_gives_them(
    text: str, found: list[Chip]
) -> None:
    assert parse_mapping(text) == found


def table(*chips: tuple[int, int, int, object]) -> str:
    """`npu-smi info`: (card, chip, device, power) with processes below."""
    rule = "+-------+-----+-----+\n"
    text = f"{rule}| npu-smi 25.2.1   Version: 25.2.1 |\n{rule}"
    text += "| NPU   Name    | Health        | Power(W)    Temp(C)    Hugepages-Usage(page)|\n"
    text += "| Chip  Phy-ID  | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB) |\n"
    for card, chip, device, watts in chips:
        text += rule
        text += f"| {card}     Ascend910  | OK            | {watts}    38         0    / 0     |\n"
        text += f"| {chip}     {device}   | 0000:9D:00.0  | 0    0    / 0     3131 / 65536  |\n"
    text += f"{rule}| NPU     Chip  | Process id  | Process name  | Process memory(MB) |\n{rule}"
    return text + f"| 0       0     | 3012        | python        | 120                |\n{rule}"


TABLE_910C = table((0, 0, 0, 166.5), (0, 1, 1, "-"), (1, 0, 2, 168.1), (1, 1, 3, "-"))


def test_the_table_says_which_chips_have_a_figure_of_their_own() -> None:
    assert parse_table(TABLE_910C) == {(0, 0): 166.5, (0, 1): None, (1, 0): 168.1, (1, 1): None}
    assert parse_table(table((2, 0, 0, "NA"), (2, 1, 1, "NA"))) == {(2, 0): None, (2, 1): None}
    assert parse_table("") == {}


@pytest.fixture
def npu_smi(tmp_path: Path):
    """Puts an npu-smi on PATH that answers with the given texts; a command without one fails."""

    def make(answers: dict[str, str]) -> dict[str, str]:
        answers = {"info -m": MAP_910B, **answers}
        shutil.rmtree(tmp_path / "answers", ignore_errors=True)
        (tmp_path / "answers").mkdir()
        for command, text in answers.items():
            (tmp_path / "answers" / command).write_text(text, encoding="utf-8")
        script = tmp_path / "npu-smi"
        script.write_text(
            '#!/bin/sh\ncd "${0%/*}/answers" || exit 9\n'
            'test -f "$*" && exec /bin/cat "$*"\n'
            "echo This device does not support it.\nexit 1\n",
            encoding="utf-8",
        )
        script.chmod(0o755)
        return {"PATH": str(tmp_path)}

    return make


@pytest.mark.parametrize(
    ("answers", "name", "watts"),
    [
        ({"info -t power -i 0 -c 0": POWER_OF_A_CHIP}, "npu-smi, NPU 0 chip 0", 9.1),
        ({"info -t power -i 0": POWER_910B}, "npu-smi, NPU 0 chip 0", 93.1),
        ({"info -t common -i 0": COMMON_910B}, "npu-smi, NPU 0 chip 0", 69.0),
        ({"info -m": MAP_310P, "info -t power -i 4": POWER_310P}, "npu-smi, NPU 4", 42.8),
        ({"info -m": MAP_310P, "info -t common -i 4": COMMON_310P}, "npu-smi, NPU 4", 13.4),
        ({"info -m": MAP_950, "info -t power -i 0": POWER_950}, "npu-smi, NPU 0 chip 0", 203.3),
    ],
)
def test_the_first_command_that_has_the_figure_is_used(npu_smi, answers, name, watts) -> None:
    source = open_npu_smi(0, npu_smi(answers))
    assert (source.name, source.read(), source.counts_energy) == (name, watts, False)


def test_each_process_measures_its_own_chip(npu_smi) -> None:
    answers = {f"info -t power -i {i} -c 0": lines((REAL, 10.0 + i)) for i in (0, 1)}
    environ = npu_smi(answers)
    assert [open_npu_smi(rank, environ).read() for rank in (0, 1)] == [10.0, 11.0]
    only_one = {**environ, "ASCEND_RT_VISIBLE_DEVICES": "1"}
    assert open_npu_smi(0, only_one).name == "npu-smi, NPU 1 chip 0"


@pytest.mark.parametrize("power", [POWER_910C_BOTH, POWER_910C_BOTH.replace("161.5", "NA")])
def test_a_figure_that_two_chips_share_is_counted_once(npu_smi, power: str) -> None:
    answers = {"info -m": MAP_910C, "info": TABLE_910C}
    answers |= {"info -t power -i 0": power, "info -t power -i 1": power.replace("166", "168")}
    environ = npu_smi(answers)
    sources = [open_npu_smi(rank, environ) for rank in range(4)]
    assert [source.read() for source in sources] == [166.5, 0.0, 168.5, 0.0]
    assert sources[1].name == "npu-smi, NPU 0 chip 0, counted by local rank 0"
    assert sources[1].counts_energy, "no watts to integrate"
    second_alone = {**environ, "ASCEND_RT_VISIBLE_DEVICES": "1,2"}
    assert [open_npu_smi(rank, second_alone).read() for rank in (0, 1)] == [166.5, 168.5]


def test_chips_of_a_card_with_a_figure_each_are_counted_each(npu_smi) -> None:
    answers = {"info -m": MAP_910C, "info": table((0, 0, 0, 166.5), (0, 1, 1, 161.5))}
    environ = npu_smi({**answers, "info -t power -i 0": POWER_910C_BOTH})
    assert [open_npu_smi(rank, environ).read() for rank in (0, 1)] == [166.5, 161.5]


def test_the_controllers_figure_of_a_card_with_two_chips_is_counted_once(npu_smi) -> None:
    mapping = columns((*HEAD, "Chip Name"), (2, 0, 0, "310P3"), (2, 1, 1, "310P3"))
    answers = {"info -m": mapping, "info": table((2, 0, 0, "NA"), (2, 1, 1, "NA"))}
    environ = npu_smi({**answers, "info -t power -i 2": POWER_310P})
    assert [open_npu_smi(rank, environ).read() for rank in (0, 1)] == [42.8, 0.0]


@pytest.mark.parametrize(
    ("rank", "answers", "words"),
    [
        (0, {"info -t power -i 0": NOT_KNOWN}, "NPU 0 chip 0: `npu-smi info -t power -i 0 -c 0`"),
        (0, {"info -t power -i 0 -c 0": lines((REAL, "0.0"))}, "shows no power"),
        (0, {"info -t power -i 0": POWER_310.replace(CARDS, "Other(W)")}, "shows no power"),
        (5, {}, "has no device 5, only 0, 1"),
        (0, {"info -m": "dcmi module initialize failed\n"}, "has no device 0, only none"),
        (0, {"info -m": MAP_910C}, "`npu-smi info` ended with 1"),
    ],
)
def test_without_a_figure_it_is_refused_in_words(npu_smi, rank, answers, words) -> None:
    with pytest.raises(NoPowerSource) as refusal:
        open_npu_smi(rank, npu_smi(answers))
    assert words in str(refusal.value) and str(refusal.value).startswith("npu-smi: ")


def test_visible_devices_that_cann_would_misread_are_refused(npu_smi) -> None:
    for value, words in (("0-3", "CANN reads it up to"), ("0", "has no 1")):
        with pytest.raises(NoPowerSource, match=words):
            open_npu_smi(1, {**npu_smi({}), "ASCEND_RT_VISIBLE_DEVICES": value})


def test_a_tool_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoPowerSource, match="npu-smi: is not on PATH"):
        open_npu_smi(0, {"PATH": str(tmp_path)})


def test_a_reading_that_fails_later_says_so(npu_smi) -> None:
    environ = npu_smi({"info -t power -i 0 -c 0": POWER_OF_A_CHIP})
    source = open_npu_smi(0, environ)
    npu_smi({"info -t power -i 0 -c 0": lines((REAL, "NA"))})
    with pytest.raises(PowerReadingError, match="shows no power of NPU 0 chip 0"):
        source.read()
    npu_smi({})
    with pytest.raises(PowerReadingError, match="ended with 1: This device does not support it"):
        source.read()
