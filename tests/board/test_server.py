"""The board as an attacker and a page meet it: over HTTP, without a browser."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from board.serving import Served, row, serving, write_run

server = pytest.importorskip("qwen2_ascend.board.server", reason="the extra board is not installed")

SECRET = "the secret of another folder"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the board, and one beside it that is none of its business."""
    world = tmp_path_factory.mktemp("world")
    write_run(
        world / "seen" / "first",
        200,
        flags={"--lr": 1e-4, "--seq-length": 128},
        model={"num_layers": 4},
        environment={"torch": "2.13.0", "device": "npu"},
        train_iters=300,
        planned_memory_bytes=31_000_000_000,
        peak_flops=400e12,
    )
    write_run(world / "seen" / "second", 200, 0.001, flags={"--lr": 2e-4, "--seq-length": 128})
    write_run(world / "seen" / "third", 200, 0.5)
    write_run(world / "outside" / "hidden", 5)
    (world / "outside" / "secret.json").write_text(json.dumps({"sublayers": [], "x": SECRET}))
    (world / "seen" / "link").symlink_to(world / "outside")
    (world / "seen" / "linked").mkdir()
    (world / "seen" / "linked" / "metrics.jsonl").symlink_to(
        world / "outside" / "hidden" / "metrics.jsonl"
    )
    return world


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[Served]:
    with serving(world / "seen") as served:
        yield served


def test_runs_are_listed_and_links_out_are_not_followed(served: Served) -> None:
    names = {run["name"] for run in served.ask("runs")["runs"]}
    assert names == {"seen/first", "seen/second", "seen/third"}


def test_curves_come_once_and_then_only_when_there_is_more(served: Served) -> None:
    asked: dict[str, Any] = {"runs": ["seen/first"], "series": ["loss", "mfu"]}
    (found,) = served.ask("curves", **asked)["runs"].values()
    assert len(found["curves"]["loss"]) == 200
    assert found["curves"]["mfu"][0][1] == pytest.approx(0.25)  # 100 of 400 TFLOP/s
    assert found["planned_memory_bytes"] == 31_000_000_000
    known = {"seen/first": found["revision"]}
    (again,) = served.ask("curves", **asked, known=known)["runs"].values()
    assert again == {"revision": found["revision"], "same": True}


def test_two_runs_side_by_side_name_what_differs(served: Served) -> None:
    found = served.ask("compare", first="seen/first", second="seen/second")
    differing = {
        x["name"]: (x["first"], x["second"]) for x in found["configuration"] if x["differs"]
    }
    assert differing == {"--lr": ("0.0001", "0.0002"), "model.num_layers": ("4", None)}
    assert found["configuration"][0]["name"] == "--lr"  # what differs comes first
    assert {"name": "torch", "first": "2.13.0", "second": None, "differs": True} in found[
        "environment"
    ]


def test_the_noise_of_two_equal_runs_finds_the_third_one_different(served: Served) -> None:
    names = ["seen/first", "seen/second", "seen/third"]
    found = served.ask("noise", first=names[0], second=names[1], series="loss", runs=names)
    assert found["others"] == {"seen/third": {"share": 1.0, "since": 1.0}}


OUT = [
    "/etc",
    "../outside/hidden",
    "seen/../../outside/hidden",
    "seen/link/hidden",
    "link/hidden",
    "seen/linked",
    "/proc/self",
    "seen/first\0",
    "",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", OUT, ids=range(len(OUT)))
def test_no_question_leaves_the_folders(served: Served, world: Path, name: str) -> None:
    start = {"method": "sft", "model": name, "data": name, "save": name}
    for question, form in {
        "run": {"run": name},
        "curves": {"runs": [name], "series": ["loss"]},
        "compare": {"first": name, "second": "seen/first"},
        "noise": {"first": name, "second": name, "series": "loss", "runs": []},
        "report": {"report": f"{name}/secret.json"},
        "preview": {"model": name, "data": name},
        "order": start,
        "start": start,
        "chat_load": {"side": "left", "model": name},
    }.items():
        found = served.ask(question, **form)
        assert list(found) == ["faults"], (question, found)
        assert SECRET not in str(found)
    assert served.ask("job") == {"state": "none"}


def test_a_run_that_is_gone_is_an_error_of_that_run_only(served: Served) -> None:
    names = ["seen/first", "seen/gone"]
    found = served.ask("curves", runs=names, series=["loss"])["runs"]
    assert found["seen/first"]["curves"]["loss"] and found["seen/gone"]["error"]
    assert served.ask("run", run="seen/gone")["faults"]


def test_the_page_serves_its_own_files_only(served: Served) -> None:
    assert b"<title>" in served.request("/").body
    for path in (
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/%2e%2e%2f%2e%2e%2fserver.py",
        "/static//etc/passwd",
        "/static/__init__.py",
        "/static/",
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/seen/first/metrics.jsonl",
    ):
        assert served.request(path).status == 404, path


def test_nothing_is_loaded_from_elsewhere(served: Served) -> None:
    policy = served.request("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    folder = Path(__file__).parents[2] / "plugin" / "qwen2_ascend" / "board" / "static"
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text, file
        assert "innerHTML" not in text and "eval(" not in text, file


def test_another_sites_page_is_refused(served: Served) -> None:
    json_type = {"Content-Type": "application/json"}
    assert served.request("/api/job", b"{}", json_type).status == 200
    assert served.request("/api/job", b"{}", json_type | {"Host": "evil.example"}).status == 421
    origin = {"Origin": "http://evil.example"}
    assert served.request("/api/job", b"{}", json_type | origin).status == 403
    assert served.request("/api/job", b"{}", {"Content-Type": "text/plain"}).status == 415
    assert served.request("/api/job", None, {}).status == 405  # GET changes nothing


def test_what_is_no_question_is_refused(served: Served) -> None:
    assert served.request("/api/__init__", b"{}").status == 404
    assert served.request("/api/jail", b"{}").status == 404
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        answer = served.request("/api/run", body)
        assert answer.status == 400 and answer.json["faults"], body[:5]
    assert served.request("/api/run", b" " * (2 << 20)).status == 400


FIELDS = """run first second series runs known report model device num_devices seq_length row place
global_batch_size method lora_r dtype data save side messages temperature max_new_tokens"""


@pytest.mark.parametrize("value", [None, 3, [], {}, "x", True, -1, [["a"]], {"a": 1}])
def test_every_question_answers_any_value_with_faults(served: Served, value: Any) -> None:
    names = re.findall(r"\w+", FIELDS)
    for question in server.QUESTIONS:
        if question == "stop":
            continue
        answer = served.request(
            f"/api/{question}", json.dumps(dict.fromkeys(names, value)).encode()
        )
        assert answer.status in (200, 400), (question, answer.body)
    assert served.ask("job") == {"state": "none"}


def test_a_token_is_asked_for_on_any_other_address(world: Path) -> None:
    token = "a-token-of-this-test"
    with serving(world / "seen", host="0.0.0.0", token=token) as served:
        assert served.request("/").status == 401
        assert served.request("/api/runs", b"{}").status == 401
        assert served.request("/static/main.js").status == 401
        assert served.request("/?token=wrong").status == 401
        opened = served.request(f"/?token={token}")
        assert opened.status == 303 and opened.headers["location"] == "/"
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        headers = {"Content-Type": "application/json", "Cookie": cookie.split(";")[0]}
        assert served.request("/api/runs", b"{}", headers).status == 200
        wrong = headers | {"Cookie": cookie.split(";")[0] + "x"}
        assert served.request("/api/runs", b"{}", wrong).status == 401


def test_hostile_runs_are_shown_as_such_and_stay_as_they_are(tmp_path: Path) -> None:
    script = write_run(tmp_path / "<img src=x onerror=alert(1)>", 3)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_bytes(b"\x00\xff" * 1000 + b"\n{}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "metrics.jsonl")
    bad = write_run(tmp_path / "bad run.json", 3)
    (bad / "run.json").write_text("[" * 100_000)
    huge = write_run(tmp_path / "huge", 3)
    with (huge / "metrics.jsonl").open("ab") as out:
        out.truncate(1 << 33)  # 8 GB of zeros
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with serving(tmp_path) as served:
        found = {run["name"].split("/", 1)[1]: run for run in served.ask("runs")["runs"]}
        assert found["broken"]["error"] and found["fifo"]["error"] and found["huge"]["error"]
        assert found["empty"]["error"] is None and found["empty"]["iteration"] is None
        assert found[script.name]["iteration"] == 3
        names = [run["name"] for run in served.ask("runs")["runs"]]
        curves = served.ask("curves", runs=names, series=["loss"])["runs"]
        by_name = {name.split("/", 1)[1]: one for name, one in curves.items()}
        assert by_name["broken"]["num_bad_lines"] == 2
        assert "FIFO" in by_name["fifo"]["error"]
        assert by_name[script.name]["curves"]["loss"]
        for name in names:
            assert "faults" not in served.ask("run", run=name)
        detail = served.ask("run", run=f"{tmp_path.name}/bad run.json")
        assert "run.json" in detail["notes"][0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_links_of_a_run_to_what_is_outside_are_not_read(tmp_path: Path) -> None:
    """A run.json or a checkpoint that is a link shows nothing of what it leads to."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text(json.dumps({"flags": {"name": "SECRET"}, "train_iters": 77}))
    (outside / "tracker").write_text("SECRET")
    linked = write_run(root / "linked", 3)
    (linked / "run.json").symlink_to(outside / "run.json")
    tracked = write_run(root / "tracked", 3)
    (tracked / "latest_checkpointed_iteration.txt").symlink_to(outside / "tracker")
    moved = write_run(root / "moved", 3)
    (moved / "latest_checkpointed_iteration.txt").write_text("2")
    (moved / "iter_0000002").symlink_to(outside)
    with serving(root) as served:
        for run in (linked, tracked, moved):
            found = served.ask("run", run=f"root/{run.name}")
            assert "SECRET" not in json.dumps(found) and found["train_iters"] is None
            assert "is a link" in found["notes"][0], found
        assert all(run["train_iters"] is None for run in served.ask("runs")["runs"])


def test_figures_beyond_all_measure_spoil_no_picture(tmp_path: Path) -> None:
    """Their sums, squares and quotients are infinite, which JSON does not have."""
    write_run(tmp_path / "good", 5)
    write_run(tmp_path / "peak", 5, peak_flops=1e-300)
    large = write_run(tmp_path / "large", 0)
    with (large / "metrics.jsonl").open("w") as out:
        for i in range(1, 3000):
            out.write(json.dumps(row(i) | {"loss": 1.7e308 if i % 2 else 2.0}) + "\n")
    names = [f"{tmp_path.name}/{name}" for name in ("good", "peak", "large")]
    with serving(tmp_path) as served:
        assert served.ask("curves", runs=names, series=["loss", "mfu"]).keys() == {"runs"}
        assert served.board.reader.wait(60)
        curves = served.ask("curves", runs=names, series=["loss", "mfu"])["runs"]
        assert curves[names[0]]["curves"]["loss"] and not curves[names[1]]["curves"]["mfu"]
        assert {point[1] for point in curves[names[2]]["curves"]["loss"]} == {2.0}
        noise = served.ask("noise", series="loss", first=names[0], second=names[2], runs=names)
        assert "faults" not in noise
