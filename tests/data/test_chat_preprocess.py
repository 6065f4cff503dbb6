"""Files of chats become MindSpeed-LLM's instruction data, and every row is accounted for."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import corpora
import numpy as np
import pytest
from chats import TOOL_TURNS, TOOLS, chat_rows, said, save_chat_tokenizer, write_rows
from transformers import AutoTokenizer

from qwen2_ascend.cli import main
from qwen2_ascend.data.chat.build import ChatDatasetBuilder
from qwen2_ascend.data.chat.formats import Chat
from qwen2_ascend.data.chat.rendering import ChatRenderer
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.data.command import main as preprocess_main
from qwen2_ascend.data.command import preprocess
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import State
from qwen2_ascend.errors import UserError

ROWS = [*chat_rows(40, seed=1), {"messages": TOOL_TURNS, "tools": TOOLS}]
KINDS = ("input_ids", "labels", "attention_mask")
PAIRS = [
    {"prompt": "what is it", "chosen": "that it was", "rejected": "with his"},
    {"prompt": "and for", "chosen": "the of", "rejected": "a 日本 語"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_tokenizer(tmp_path_factory.mktemp("chat_tokenizer"))


def run(output: Path, source: Path | list[Path], tokenizer: Path, **settings) -> None:
    sources = source if isinstance(source, list) else [source]
    settings = {"task": "sft", "workers": 1, **settings}
    preprocess(
        PreprocessSettings(
            input=tuple(map(str, sources)),
            output_prefix=output,
            tokenizer_name_or_path=str(tokenizer),
            **settings,
        )
    )


def stored(output: Path, key: str) -> list[np.ndarray]:
    return corpora.stored(f"{output}_packed_{key}_document")


def files(output: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(output.name): path.read_bytes()
        for path in output.parent.glob(f"{output.name}_packed_*")
        if path.suffix != ".json"
    }


@pytest.fixture(scope="module")
def expected(tokenizer: Path, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    run(folder / "a", write_rows(folder / "a.jsonl", ROWS), tokenizer)
    return files(folder / "a")


def test_rows_are_the_renderings_with_labels_where_the_loss_is(tokenizer, tmp_path: Path) -> None:
    run(tmp_path / "a", write_rows(tmp_path / "a.jsonl", ROWS), tokenizer)
    chats = [
        Chat(
            row["messages"],
            row.get("tools"),
            tuple(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"),
        )
        for row in ROWS
    ]
    rendered = ChatRenderer(AutoTokenizer.from_pretrained(tokenizer))(chats)
    columns = (stored(tmp_path / "a", kind) for kind in KINDS)
    for ids, labels, mask, tokens in zip(*columns, rendered, strict=True):
        assert ids.tolist() == tokens.ids.tolist()
        assert labels.tolist() == np.where(tokens.trained, tokens.ids, -100).tolist()
        assert mask.tolist() == [1] * len(ids)
        assert ids.dtype == labels.dtype == mask.dtype == np.int32


@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "parquet", "json.gz"])
def test_every_file_format_gives_the_same(kind, tokenizer, expected, tmp_path, capsys) -> None:
    rows = ROWS
    if kind == "parquet":
        # as the type of an Arrow struct, which has every row's keys: as JSON
        rows = [{key: json.dumps(row.get(key)) for key in ("messages", "tools")} for row in ROWS]
    path = write_rows(tmp_path / f"a.{kind}", rows)
    run(tmp_path / "a", path, tokenizer)
    assert files(tmp_path / "a") == expected
    assert f"{path}: OpenAI messages\n" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_damaged_packed_array_is_named(share: float, tokenizer, tmp_path: Path) -> None:
    """Whether its start can be read, which says that it is an array, or not even that."""
    path = write_rows(tmp_path / "a.json.gz", chat_rows(200))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"a\.json\.gz: damaged or incomplete gzip"):
        run(tmp_path / "a", path, tokenizer)


def test_parquet_values_that_json_has_not_are_texts_or_refused(tokenizer, tmp_path: Path) -> None:
    """Texts that a writer gives as bytes are texts; no date is trained on as Python writes it."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    turn = pa.struct([("role", pa.string()), ("content", pa.binary())])
    rows = [[said("user", b"hi"), said("assistant", "語".encode())]]  # type: ignore
    table = pa.table({"messages": pa.array(rows, pa.list_(turn)), "at": [date(2024, 1, 2)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    run(tmp_path / "a", tmp_path / "a.parquet", tokenizer)
    write_rows(tmp_path / "b.jsonl", [{"messages": [said("user", "hi"), said("assistant", "語")]}])
    run(tmp_path / "b", tmp_path / "b.jsonl", tokenizer)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    broken = pa.Array.from_buffers(
        pa.string(),
        1,
        [None, pa.py_buffer(bytes((0, 0, 0, 0, 2, 0, 0, 0))), pa.py_buffer(b"a\xff")],
    )
    for answers, reason in (
        ([date(2024, 1, 2)], r"'output' is .*Parquet's date.*, not a string"),
        ([b"\xff"], r"'output' is .*Parquet's bytes.*, not a string"),
        (broken, "row 1: not UTF-8: byte 0xff"),
    ):
        table = pa.table({"instruction": ["q"], "output": answers})
        pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
        with pytest.raises(UserError, match=reason):
            run(tmp_path / "c", tmp_path / "c.parquet", tokenizer)


def test_nested_parquet_columns_are_read(tokenizer, tmp_path: Path) -> None:
    """Arrow gives every row the keys of all; those a row does not have are null and go."""
    rows = [{"messages": row["messages"], "tools": None} for row in ROWS[:-1]]
    tools = [said("user", "q"), {**TOOL_TURNS[1]}, said("tool", "r"), said("assistant", "a")]
    rows.append({"messages": tools, "tools": TOOLS})
    run(tmp_path / "a", write_rows(tmp_path / "a.parquet", rows), tokenizer)
    run(tmp_path / "b", write_rows(tmp_path / "b.jsonl", rows), tokenizer)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def two_files(folder: Path) -> list[Path]:
    return [write_rows(folder / "a.jsonl", ROWS[:20]), write_rows(folder / "b.json", ROWS[20:])]


def test_workers_and_parts_change_nothing(tokenizer, expected, tmp_path: Path) -> None:
    sources = two_files(tmp_path)
    run(tmp_path / "out", sources, tokenizer, workers=2, save_interval_mb=0.002)
    assert files(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_run_that_was_interrupted_is_resumed(tokenizer, expected, tmp_path, monkeypatch) -> None:
    sources = two_files(tmp_path)
    saves = []
    save = State.save

    def stop(state: State, folder: Path) -> None:
        save(state, folder)
        saves.append(state)
        if len(saves) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", sources, tokenizer, save_interval_mb=0.002)
    assert saves[-1].position.file == 1, "the test should stop inside the JSON array"
    assert not files(tmp_path / "out")
    run(tmp_path / "out", sources, tokenizer, save_interval_mb=0.002, resume=True)
    assert files(tmp_path / "out") == expected


BAD = [
    ROWS[0],
    {"messages": []},
    {"messages": [said("user", "q")]},
    ROWS[1],
    {"text": "no chat"},
]


@pytest.mark.parametrize(("name", "places"), [("a.jsonl", ":{}"), ("a.json", " row {}")])
def test_bad_rows_are_named_and_stop_or_are_skipped(
    name, places, tokenizer, tmp_path: Path, capsys
) -> None:
    path = write_rows(tmp_path / name, BAD)
    if name.endswith("l"):
        path.write_bytes(path.read_bytes() + b"{broken\n" + b'{"messages": "\xff"}\n')
    with pytest.raises(UserError) as caught:
        run(tmp_path / "a", path, tokenizer)
    where = str(path) + places
    assert f"{where.format(2)}: 'messages' is empty." in str(caught.value)
    assert "--on-bad-row skip" in str(caught.value)
    assert not list(tmp_path.glob("*_packed_*"))

    run(tmp_path / "a", path, tokenizer, on_bad_row="skip")
    assert len(stored(tmp_path / "a", "input_ids")) == 2
    listed = (tmp_path / "a_bad_rows.tsv").read_text().splitlines()
    numbers = [2, 3, 5, 6, 7] if name.endswith("l") else [2, 3, 5]
    assert [line.split("\t")[0] for line in listed] == [where.format(n) for n in numbers]
    out = capsys.readouterr().out
    assert f"bad rows  {len(numbers)}, listed in {tmp_path / 'a_bad_rows.tsv'}" in out


def test_a_broken_array_is_refused_with_its_line(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"messages": []},\n{"messages": ]\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:3: is not JSON")):
        run(tmp_path / "a", path, tokenizer, on_bad_row="skip")


def test_long_chats_are_cut_and_counted(tokenizer, expected, tmp_path: Path, capsys) -> None:
    """What is left with nothing to train on is a bad row."""
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    run(tmp_path / "whole", path, tokenizer)
    run(tmp_path / "a", path, tokenizer, seq_length=60, on_bad_row="skip")
    whole = {kind: stored(tmp_path / "whole", kind) for kind in KINDS}
    good = [i for i, labels in enumerate(whole["labels"]) if (labels[1:60] != -100).any()]
    assert 0 < len(good) < len(ROWS)
    for kind in KINDS:
        cut = [whole[kind][i][:60].tolist() for i in good]
        assert [row.tolist() for row in stored(tmp_path / "a", kind)] == cut
    truncated = sum(len(whole["labels"][i]) > 60 for i in good)
    assert truncated
    out = capsys.readouterr().out
    assert f"  truncated        {truncated} chats, to 60 tokens\n" in out
    assert f"bad rows  {len(ROWS) - len(good)}, " in out
    assert "has no token to train on in its first 60 of" in (
        (tmp_path / "a_bad_rows.tsv").read_text()
    )


def test_summary_counts_what_was_written(tokenizer, tmp_path: Path, capsys) -> None:
    run(tmp_path / "a", write_rows(tmp_path / "a.jsonl", ROWS), tokenizer)
    lengths = sorted(len(row) for row in stored(tmp_path / "a", "input_ids"))
    trained = sum(int((row[1:] != -100).sum()) for row in stored(tmp_path / "a", "labels"))
    out = capsys.readouterr().out
    n = len(ROWS)
    assert f"  chats            {n}\n" in out
    assert f"  tokens           {sum(lengths):,}\n" in out
    assert (
        f"min {lengths[0]}, median {lengths[(n - 1) // 2]}, "
        f"p90 {lengths[-(-n * 9 // 10) - 1]}, max {lengths[-1]}\n"
    ) in out
    assert f"trained on       {trained:,} tokens, {trained / sum(lengths):.1%}\n" in out
    assert f"processed {n} documents, {sum(lengths):,} tokens" in out
    about = json.loads((tmp_path / "a_packed_input_ids_document.json").read_text())
    assert (about["documents"], about["trained_tokens"]) == (n, trained)


def test_packs_whose_chats_see_one_another_are_refused_where_they_must_not(
    tokenizer, tmp_path: Path
) -> None:
    """--pack alone, and a run with --neat-pack or --reset-position-ids."""
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    settings = {"seq_length": 400, "seed": 1}
    for name, flag, ends in (("mixed", "pack", False), ("neat", "neat_pack", True)):
        run(tmp_path / name, path, tokenizer, seq_length=400, **{flag: True})
        words = {"data_path": [str(tmp_path / name)], **settings}
        train = ChatDatasetBuilder(**words).build().train
        assert (max(len(train[i]["ends"]) for i in range(len(train))) > 2) == ends
        if ends:
            ChatDatasetBuilder(**words, keep_chats_apart=True).build()
            continue
        with pytest.raises(UserError, match=r"see one another, and they are not to; .*neat-pack"):
            ChatDatasetBuilder(**words, keep_chats_apart=True).build()


def test_packs_hold_every_chat_once_numbered_and_padded(tokenizer, tmp_path, capsys) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    run(tmp_path / "single", path, tokenizer, seq_length=400)
    run(tmp_path / "a", path, tokenizer, seq_length=400, neat_pack=True)
    columns = [stored(tmp_path / "a", kind) for kind in KINDS]
    found = []
    for ids, labels, mask in zip(*columns, strict=True):
        assert len(ids) == 400
        assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == 0).all()
        assert (np.diff(mask[mask > 0]) >= 0).all()
        assert mask.all() or not mask[mask.argmin() :].any()
        for number in range(1, mask.max() + 1):
            found.append((ids[mask == number].tolist(), labels[mask == number].tolist()))
    single = [stored(tmp_path / "single", kind) for kind in KINDS[:2]]
    assert sorted(found) == sorted((i.tolist(), la.tolist()) for i, la in zip(*single, strict=True))
    tokens = sum(len(ids) for ids, _ in found)
    full = f"{tokens / (len(columns[0]) * 400):.1%}"
    assert f"  packs            {len(columns[0])} of 400, {full} full\n" in capsys.readouterr().out


def test_pairs_have_a_chosen_and_a_rejected_side(tokenizer, tmp_path: Path) -> None:
    run(tmp_path / "a", write_rows(tmp_path / "a.jsonl", PAIRS), tokenizer, task="dpo")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    for side in ("chosen", "rejected"):
        ids, labels = (stored(tmp_path / "a", f"{side}_{kind}") for kind in KINDS[:2])
        for row, i, la in zip(PAIRS, ids, labels, strict=True):
            messages = [said("user", row["prompt"]), said("assistant", row[side])]
            assert i.tolist() == loaded.apply_chat_template(messages, return_dict=False)
            assert loaded.decode(la[la != -100]) == f"{row[side]}<|im_end|>"
    assert not list(tmp_path.glob("*attention_mask*"))


def test_map_keys_and_flags_reach_the_rows(tokenizer, tmp_path: Path, capsys) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "hi", "a": "there", "input": None}])
    chat = ChatSettings(map_keys='{"prompt": "q", "response": "a"}', train_on_prompt=True)
    run(tmp_path / "a", path, tokenizer, chat=chat)
    assert f"{path}: Alpaca (prompt=q, response=a)\n" in capsys.readouterr().out
    (ids,), (labels,) = (stored(tmp_path / "a", kind) for kind in KINDS[:2])
    messages = [said("user", "hi"), said("assistant", "there")]
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert (
        ids.tolist() == labels.tolist() == loaded.apply_chat_template(messages, return_dict=False)
    )


def test_a_template_that_cannot_be_used_is_said_with_its_row(tokenizer, tmp_path: Path) -> None:
    from test_chat_rendering import REWRITING

    (tmp_path / "t.jinja").write_text(REWRITING)
    turns = [said("user", "q"), said("assistant", "x</think>a")] * 2
    path = write_rows(tmp_path / "a.jsonl", [ROWS[0], {"messages": turns}])
    chat = ChatSettings(chat_template=tmp_path / "t.jinja")
    with pytest.raises(UserError, match=rf"{path}:2: the chat template renders the first 2 mess"):
        run(tmp_path / "a", path, tokenizer, chat=chat, on_bad_row="skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pack": True}, "--pack needs --seq-length"),
        ({"pack": True, "seq_length": 9, "task": "dpo"}, "preference pairs are not packed"),
        ({"append_eod": True}, "--append-eod is for texts"),
        ({"split_text_on": "line"}, "--split-text-on is for texts"),
        ({"task": "pretrain", "seq_length": 9}, "--seq-length has no effect without --task sft"),
        (
            {"task": "pretrain", "chat": ChatSettings(train_on_prompt=True)},
            "--train-on-prompt has no effect without --task sft",
        ),
    ],
)
def test_flags_that_contradict(settings, message, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a", tmp_path / "a.jsonl", tmp_path, **settings)


def test_text_files_and_unknown_rows_are_refused(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"is no \.json, \.jsonl or \.parquet file"):
        run(tmp_path / "a", tmp_path / "a.txt", tokenizer)
    path = write_rows(tmp_path / "b.jsonl", [{"text": "t"}])
    with pytest.raises(UserError, match=rf"{path}:1: has no 'messages'; it has 'text'; chats have"):
        run(tmp_path / "b", path, tokenizer, on_bad_row="skip")


def test_mindspeeds_command_line_is_understood(tokenizer, tmp_path: Path) -> None:
    rows = [{"instruction": "hi", "input": "", "output": "there"}] * 3
    words = f"""--task sft --input {write_rows(tmp_path / "a.json", rows)}
        --tokenizer-name-or-path {tokenizer} --output-prefix {tmp_path / "a"} --workers 1
        --handler-name AlpacaStyleInstructionHandler --tokenizer-type PretrainedFromHF
        --log-interval 1000 --prompt-type qwen --seq-length 64 --pack --neat-pack"""
    preprocess_main(words.split())
    assert {len(row) for row in stored(tmp_path / "a", "input_ids")} == {64}


def test_unused_keys_are_listed_once_with_counts(tmp_path: Path, capsys) -> None:
    rows = chat_rows(30, seed=4)
    for row in rows[:20]:
        row["source"] = "web"
    rows[3]["messages"][1]["mood"] = "\x1b[2Jgood"
    rows[4]["a\x1b[2J"] = 1
    path = write_rows(tmp_path / "c.jsonl", rows)
    tokenizer = save_chat_tokenizer(tmp_path / "hf")
    words = ["preprocess", "--task", "sft", "--input", path, "--output-prefix", tmp_path / "o"]
    assert main([*map(str, words), "--tokenizer-name-or-path", str(tokenizer)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "keys not used" in x)
    assert line.startswith("  keys not used    'source' (20 rows), ")
    assert "'mood' of a message (1 rows)" in line and "'a\\x1b[2J' (1 rows)" in line
