"""The board's web server: the page's files, and what the page asks, each question a POST of JSON.

Everything a question needs is in the modules beside this one; here is which of them answers it.
Whatever a user can mend comes back as `faults`, which the page shows.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2_ascend import __version__
from qwen2_ascend.board import noise, plans, precision, runs
from qwen2_ascend.board.access import COOKIE, HEADERS, Access
from qwen2_ascend.board.forms import choice, text, whole
from qwen2_ascend.board.jail import Jail
from qwen2_ascend.board.job import REPOSITORY, Jobs, order
from qwen2_ascend.board.listing import METRICS_FILE, Lister
from qwen2_ascend.board.metrics import MetricsFile
from qwen2_ascend.board.preview import preview
from qwen2_ascend.board.reading import Reader
from qwen2_ascend.board.talker import SIDES, Talkers, question
from qwen2_ascend.errors import UserError, printable, shown
from qwen2_ascend.planning.log import RUN_FILE

MAX_BODY_BYTES = 1 << 20
MAX_RUNS = 400
"""How many runs one picture shows at most."""
MAX_SERIES = 16
FEWEST_POINTS, MOST_POINTS = 60, 1000
"""How many points a curve has at least and at most; it has fewer where there are many curves."""
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

Form = Mapping[str, Any]


@dataclass(kw_only=True)
class Board:
    """What the questions are about."""

    jail: Jail
    access: Access

    def __post_init__(self) -> None:
        self.list = Lister(self.jail)
        self.reader = Reader()
        self.jobs = Jobs()
        self.talkers = Talkers()
        self._described: dict[Path, tuple[float, runs.Description]] = {}

    def state(self, form: Form) -> dict[str, Any]:
        """What the forms offer."""
        listing = self.list()
        return {
            "version": __version__,
            "folders": {label: str(root) for label, root in self.jail.roots.items()},
            "models": [self.jail.name(path) for path in listing.models],
            "data": [self.jail.name(path) for path in listing.data],
            "is_cut": listing.is_cut,
            "devices": plans.DEVICE_NAMES,
            "sizes": plans.SIZES,
            "loaded": {s: self.jail.name(path) for s, path in self.talkers.loaded().items()},
        }

    # --- runs -------------------------------------------------------------------------------------

    def runs(self, form: Form) -> dict[str, Any]:
        """Every run, the last changed first."""
        listing = self.list()
        found = [
            {"name": self.jail.name(folder), **asdict(runs.run_state(folder))}
            for folder in listing.runs
        ]
        found.sort(key=lambda run: run["modified"], reverse=True)
        return {"runs": found, "is_cut": listing.is_cut}

    def curves(self, form: Form) -> dict[str, Any]:
        """Curves of runs; of a run that the page knows as it is by now nothing but its name."""
        names, series = _texts(form, "runs", MAX_RUNS), _texts(form, "series", MAX_SERIES)
        known = form.get("known")
        known = known if isinstance(known, Mapping) else {}
        folders = [self._run(name) for name in names]
        most = max(FEWEST_POINTS, min(MOST_POINTS, 12_000 // max(len(names), 1)))
        paths = [folder / METRICS_FILE for folder in folders]
        found = self.reader.look(paths, lambda file: self._curves(file, series, most, known))
        return {"runs": dict(zip(names, found, strict=True))}

    def _curves(
        self, file: MetricsFile, series: list[str], most: int, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = self.jail.name(file.path.parent)
        revision = f"{file.revision}/{','.join(series)}/{most}"
        if known.get(name) == revision and not file.error:
            return {"revision": revision, "same": True}
        described = self._description(file.path.parent)
        curves = {one: _curve(file, one, most, described) for one in series}
        return {
            "revision": revision,
            "curves": curves,
            "names": file.buckets.names,
            "is_sampled": file.is_sampled,
            "num_bad_lines": file.num_bad_lines,
            "first_bad_line": printable(file.first_bad_line or ""),
            "error": file.error,
            "planned_memory_bytes": described.planned_memory_bytes,
        }

    def run(self, form: Form) -> dict[str, Any]:
        """What is known of a run besides its curves."""
        folder = self.jail.existing(str(self._run(text(form, "run"))))
        log = runs.find_log(folder)
        lines, fault = [], None
        if log is not None:
            try:
                lines = runs.log_tail(log)
            except (OSError, UserError) as error:
                fault = runs.reason(error)
        return {
            **asdict(self._description(folder)),
            "folder": str(folder),
            "checkpoints": [asdict(one) for one in runs.checkpoints(folder)],
            "log": None if log is None else self.jail.name(log),
            "log_lines": lines,
            "log_error": fault,
        }

    def compare(self, form: Form) -> dict[str, Any]:
        """Configuration and environment of two runs side by side."""
        first, second = (
            self._description(self._run(text(form, key))) for key in ("first", "second")
        )
        return {
            "configuration": runs.differences(first.configuration, second.configuration),
            "environment": runs.differences(first.environment, second.environment),
            "notes": [*first.notes, *second.notes],
        }

    def noise(self, form: Form) -> dict[str, Any]:
        """The noise band of two equal runs, and how others lie to it."""
        name = text(form, "series")
        pair = [text(form, key) for key in ("first", "second")]
        others = [one for one in _texts(form, "runs", MAX_RUNS) if one not in pair]
        paths = [self._run(one) / METRICS_FILE for one in (*pair, *others)]
        first, second, *rest = self.reader.look(paths, lambda file: file.buckets.points(name))
        band = noise.noise_band(first, second)
        if band is None:
            raise UserError(f"{pair[0]} and {pair[1]} have no iterations with {name} in common.")
        found = {}
        for one, curve in zip(others, rest, strict=True):
            lies = noise.outside(band, curve)
            found[one] = None if lies is None else lies._asdict()
        return {"band": band._asdict(), "factor": noise.BAND, "others": found}

    def _run(self, name: str) -> Path:
        """A run's folder.

        Raises:
            UserError: it is outside of the board's folders, or its metrics are.
        """
        folder = self.jail.path(name)
        self.jail.path(str(folder / METRICS_FILE))
        return folder

    def _description(self, folder: Path) -> runs.Description:
        """`runs.describe`, again only when the folder or its run.json has changed."""
        changed = max(_modified(folder), _modified(folder / RUN_FILE))
        kept = self._described.get(folder)
        if kept is None or kept[0] != changed:
            kept = self._described[folder] = (changed, runs.describe(folder))
        return kept[1]

    # --- plan -------------------------------------------------------------------------------------

    def plan(self, form: Form) -> dict[str, Any]:
        """The planner's table."""
        return plans.answer(plans.question(form, self.jail))

    def plan_command(self, form: Form) -> dict[str, Any]:
        """A row of the table as a launch command."""
        asked, row = plans.question(form, self.jail), whole(form, "row", 0, plans.MAX_ROWS)
        return {"command": plans.command(asked, row, choice(form, "place", plans.PLACES))}

    # --- precision --------------------------------------------------------------------------------

    def reports(self, form: Form) -> dict[str, Any]:
        """Reports of align_qwen2.py, the newest first."""
        found = sorted(self.list().reports, key=_modified, reverse=True)
        return {"reports": [self.jail.name(path) for path in found]}

    def report(self, form: Form) -> dict[str, Any]:
        """One of them."""
        return precision.read_report(self.jail.existing(text(form, "report")))

    # --- start ------------------------------------------------------------------------------------

    def preview(self, form: Form) -> dict[str, Any]:
        """The first chats of a file, and what of them is trained on."""
        model, data = (self.jail.existing(text(form, key)) for key in ("model", "data"))
        if not data.is_file():
            raise UserError(f"{self.jail.name(data)}: is no file.")
        return preview(model, data)

    def order(self, form: Form) -> dict[str, Any]:
        """The command of a form."""
        return {"command": order(form, self.jail).shown, "cwd": str(REPOSITORY)}

    def start(self, form: Form) -> dict[str, Any]:
        """Starts it."""
        self.jobs.start(order(form, self.jail))
        return self.job(form)

    def stop(self, form: Form) -> dict[str, Any]:
        """Ends it, after it has saved."""
        self.jobs.stop()
        return self.job(form)

    def job(self, form: Form) -> dict[str, Any]:
        """The board's run: its state, its last lines, how far it is."""
        state = self.jobs.state()
        folder = state.pop("folder", None)
        if folder is None:
            return state
        log = runs.find_log(folder)
        run = runs.run_state(folder)
        state |= {"run": self.jail.name(folder), "progress": asdict(run)}
        return state | {"log_lines": [] if log is None else runs.log_tail(log)}

    # --- chat -------------------------------------------------------------------------------------

    def chat_load(self, form: Form) -> dict[str, Any]:
        """Loads a model to talk to."""
        side, folder = choice(form, "side", SIDES), self.jail.existing(text(form, "model"))
        return {"description": printable(self.talkers.load(side, folder))}

    def chat_unload(self, form: Form) -> dict[str, Any]:
        """Frees it."""
        self.talkers.unload(choice(form, "side", SIDES))
        return {}

    def chat_stop(self, form: Form) -> dict[str, Any]:
        """Ends the answer that it is giving."""
        self.talkers.talker(choice(form, "side", SIDES)).stop()
        return {}

    def chat_ask(self, form: Form) -> Iterator[dict[str, Any]]:
        """Its answer, piece by piece."""
        talker = self.talkers.talker(choice(form, "side", SIDES))
        return talker.answer(question(form))


QUESTIONS = (
    "state",
    "runs",
    "curves",
    "run",
    "compare",
    "noise",
    "plan",
    "plan_command",
    "reports",
    "report",
    "preview",
    "order",
    "start",
    "stop",
    "job",
    "chat_load",
    "chat_unload",
    "chat_stop",
    "chat_ask",
)
"""What /api/NAME may be; each is a method of Board."""


def create_app(board: Board) -> ASGIApp:
    """The application that a server runs."""
    pages = _pages()

    async def page(request: Request) -> Response:
        name = request.path_params.get("name") or "index.html"
        if name == "index.html" and "token" in request.query_params:
            return _with_cookie(board.access)
        found = pages.get(name)
        if found is None:
            return Response("not found", status_code=404)
        return Response(found, media_type=TYPES[Path(name).suffix])

    async def api(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in QUESTIONS:
            return _faults(404, f"there is no question {name!r}.")
        return await _answered(request, getattr(board, name))

    routes = [
        Route("/", page),
        Route("/static/{name}", page),
        Route("/api/{name}", api, methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes), board.access)


def _pages() -> dict[str, bytes]:
    """The page's files, read once; a request names one of these and no path."""
    folder = files("qwen2_ascend.board") / "static"
    return {
        one.name: one.read_bytes() for one in folder.iterdir() if Path(one.name).suffix in TYPES
    }


def _with_cookie(access: Access) -> Response:
    """Sends the browser to the address without the token, which the cookie has from now on."""
    response = RedirectResponse("/", status_code=303)
    if access.token is not None:
        response.set_cookie(COOKIE, access.token, httponly=True, samesite="strict")
    return response


async def _answered(request: Request, method: Callable[[Form], Any]) -> Response:
    try:
        found = await run_in_threadpool(method, await _form(request))
        if isinstance(found, Iterator):
            return StreamingResponse(_written(found), media_type="application/x-ndjson")
        return JSONResponse(found)
    except UserError as error:
        return _faults(400, *error.faults)
    except Exception as error:  # a fault of ours: the page says it, and the board goes on
        return _faults(500, printable(f"{type(error).__name__}: {error}"))


async def _written(lines: Iterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Lines of JSON; when the page goes away the answer is stopped."""
    over = object()
    try:
        while True:
            line = await run_in_threadpool(next, lines, over)
            if line is over:
                return
            yield json.dumps(line) + "\n"
    except UserError as error:
        yield json.dumps({"faults": error.faults}) + "\n"
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(lines.close)  # type: ignore[attr-defined]


async def _form(request: Request) -> Form:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise UserError(f"the request has more than {MAX_BODY_BYTES} bytes.")
    try:
        form = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON.") from None
    if not isinstance(form, dict):
        raise UserError("the request is no object.")
    return form


def _faults(status: int, *faults: str) -> Response:
    return JSONResponse({"faults": faults}, status_code=status)


class _Guard:
    """Refuses what `Access` refuses, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page opens no websocket

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope)
        refusal = self._access.refusal(
            scope["method"], Headers(scope=scope), request.query_params.get("token")
        )
        app = self._app if refusal is None else _faults(refusal.status, refusal.reason)
        await app(scope, receive, with_headers)


def _curve(
    file: MetricsFile, name: str, most: int, described: runs.Description
) -> list[tuple[float, ...]]:
    if name != "mfu":
        return file.buckets.points(name, most)  # type: ignore[return-value]
    if not described.peak_flops:
        return []
    scale = 1e12 / described.peak_flops
    points = file.buckets.points("tflops_per_device", most)
    return [(x, mean * scale, low * scale, high * scale) for x, mean, low, high in points]


def _texts(form: Form, name: str, most: int) -> list[str]:
    values = form.get(name)
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise UserError(f"{name} {shown(values)} must be a list of names.")
    if len(values) > most:
        raise UserError(f"{name}: {len(values)} are more than the {most} that fit in one picture.")
    return list(dict.fromkeys(values))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
