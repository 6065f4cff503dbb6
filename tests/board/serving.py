"""A board on a free port, asked as its page asks it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen2_ascend.board.access import Access
from qwen2_ascend.board.jail import Jail

if TYPE_CHECKING:
    from qwen2_ascend.board.server import Board


class Answer(NamedTuple):
    """What a request got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served(NamedTuple):
    """A running board."""

    board: Board
    url: str

    def ask(self, question: str, **form: Any) -> Any:
        """The answer to a question, or {"faults": [...]}."""
        return self.request(f"/api/{question}", json.dumps(form).encode()).json

    def request(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Any request; JSON unless `headers` say otherwise."""
        given = {"Content-Type": "application/json"} if headers is None else dict(headers)
        request = urllib.request.Request(self.url + path, body, given)
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=120) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


@contextlib.contextmanager
def serving(*folders: Path, host: str = "127.0.0.1", token: str | None = None) -> Iterator[Served]:
    """A board of some folders until the block ends."""
    import uvicorn

    from qwen2_ascend.board.server import Board, create_app

    board = Board(jail=Jail(folders), access=Access(host, token))
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(board), log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(board, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        board.talkers.close()
        if (state := board.jobs.state())["state"] in ("running", "stopping"):  # a test has failed
            os.killpg(state["pid"], signal.SIGKILL)
        server.should_exit = True
        thread.join(10)
        listening.close()


def write_run(folder: Path, steps: int, offset: float = 0.0, **described: Any) -> Path:
    """A run's folder with a metrics.jsonl; with a run.json where that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as out:
        for i in range(1, steps + 1):
            out.write(json.dumps(row(i, offset)) + "\n")
    if described:
        (folder / "run.json").write_text(json.dumps(described))
    return folder


def row(iteration: int, offset: float = 0.0) -> dict[str, Any]:
    """A row as training writes it."""
    return {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "loss": 4.0 / iteration**0.3 + 0.01 * (iteration * 7919 % 13) + offset,
        "grad_norm": 1.0 + 0.1 * (iteration % 5),
        "lr": 1e-4,
        "tokens_per_second": 4000.0,
        "step_seconds": 0.25,
        "tflops_per_device": 100.0,
        "peak_memory_bytes": 30_000_000_000,
        "joules_per_token": 0.2,
        "loss_scale": 1.0,
        "skipped": 0,
    }
