"""`qwen2-ascend board`."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwen2_ascend.board.access import Access, is_loopback
from qwen2_ascend.board.jail import Jail
from qwen2_ascend.errors import UserError

if TYPE_CHECKING:
    from qwen2_ascend.board.server import Board

TOKEN_VARIABLE = "QWEN2_ASCEND_BOARD_TOKEN"
MIN_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class BoardOptions:
    """A page to plan, watch, compare, start and talk: serves on this machine until Ctrl-C.

    qwen2-ascend board out/
    """

    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[FOLDER ...]")
    ] = ()
    """What the page may see, and save below: runs, models, data. By default the folder where the
    command is started."""
    host: str = "127.0.0.1"
    """Address to listen on. On any other than this machine's own a token is asked for."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    token: tyro.conf.FlagCreatePairsOff[bool] = False
    """Ask for a token on this machine too, which others may share with you. It is made anew at each
    start, or taken from the variable QWEN2_ASCEND_BOARD_TOKEN."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and serves until Ctrl-C or SIGTERM.

    Raises:
        UserError: folders, address or port cannot be used, or the extra is not installed.
    """
    options = tyro.cli(BoardOptions, args=argv, description=BoardOptions.__doc__)
    jail = Jail(options.folders or (Path("."),))
    token = wanted_token(options)
    try:
        import uvicorn

        from qwen2_ascend.board.server import Board, create_app
    except ImportError as error:
        raise UserError(
            f"the board needs {error.name}: pip install 'qwen2-ascend[board]'."
        ) from None
    board = Board(jail=jail, access=Access(options.host, token))
    config = uvicorn.Config(
        create_app(board), log_level="warning", access_log=False, server_header=False, ws="none"
    )
    with _listening(options.host, options.port) as listening:
        print(address(options.host, listening.getsockname()[1], token), flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            _end(board)


def wanted_token(options: BoardOptions) -> str | None:
    """The token that is asked for, or None where the board listens on this machine alone.

    Raises:
        UserError: the variable holds one that is too short.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is not None and len(given) < MIN_TOKEN:
        raise UserError(f"{TOKEN_VARIABLE}: give at least {MIN_TOKEN} characters.")
    if given is None and is_loopback(options.host) and not options.token:
        return None
    return given or secrets.token_urlsafe(24)


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port} must be from 0 to {(1 << 16) - 1}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}; "
            "--port 0 takes a free port."
        ) from None


def _end(board: Board) -> None:
    board.talkers.close()
    state = board.jobs.state()
    if state["state"] in ("running", "stopping"):
        print(f"the run goes on: process {state['pid']}, {state['folder']}", flush=True)
