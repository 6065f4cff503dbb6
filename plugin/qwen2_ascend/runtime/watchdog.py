"""Who is lost: every rank's heart beats in the store, and ranks look after each other.

A rank that was stopped, or whose machine cannot be reached, is not noticed by those that wait for
it until their collective times out, and they cannot tell who it is: what they wait for is often a
neighbour that waits itself. So each rank writes a beat every second or two, looks whether the beat
of the rank before it changes, and ends the run when it has not for the time-out: every rank, with
one message that names the silent ones.

Two threads, as an operation on the store can block for ever when the store's machine is gone: the
talker, and the judge, who judges the store by the talker. The judge also winds up a timer of the
kernel's that kills this process should it run down: a stopped process cannot end itself.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from qwen2_ascend.runtime import ending

MOST_NAMED = 8
"""Ranks that a message names one by one."""
SHORTEST_SECONDS = 0.1
"""The least time between two beats; a longer step is told at once."""
STOP_SECONDS = 5
"""What is left to a rank after Ctrl-C, wherever it is."""
_BYE = "bye"
_TELL_SECONDS = 2


def interval_seconds(timeout_seconds: float) -> float:
    """Seconds between two beats."""
    return min(max(timeout_seconds / 30, 0.5), 1.5)


def timer_seconds(timeout_seconds: float) -> float:
    """The seconds before the kernel kills a stopped process; the others have named it by then.

    It takes them two beats to miss it, and two and a half to see who else is silent.
    """
    return timeout_seconds + max(5 * interval_seconds(timeout_seconds) + 0.5, 4)


class Beat(NamedTuple):
    """What a rank tells of itself."""

    number: str
    """Another one each time; "bye" of a rank that has ended well."""
    step: str
    """The last one it has made; empty before the first."""
    host: str
    where: str
    """The line of Python it is at."""

    def encode(self) -> str:
        return "\t".join(self)

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        return cls(*text.decode().split("\t"))


@dataclass
class _Seen:
    """What a rank has seen of the others."""

    looked: float
    """The time it looked last."""
    changed: float
    """The time the beat of the rank before it was another one."""
    before: tuple[int, str] = (-1, "")
    """The rank before it, and the number of its beat."""
    failed: float | None = None
    """The time it saw that some rank had failed."""


class Cause(NamedTuple):
    """Why a rank has to end that did nothing wrong."""

    who: str
    """The rank that failed and its machine; empty where the message names those that are silent."""
    message: str

    def __str__(self) -> str:
        return f"{self.who}: {self.message}" if self.who else self.message


class Watched(Protocol):
    """The ranks that are watched over, as one of them knows them: `meeting.Meeting`."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def store(self) -> Any: ...
    @property
    def server(self) -> tuple[str, int] | None: ...
    def clone(self, seconds: float) -> Any: ...


class Watchdog:
    """Watches over the ranks of a meeting from `start` to `close`."""

    def __init__(self, meeting: Watched) -> None:
        self._meeting = meeting
        self.allow(meeting.timeout_seconds)
        self._store: Any = meeting.clone(meeting.timeout_seconds)
        self._timer = _KillTimer()
        self._closed = threading.Event()
        self._stepped = threading.Event()
        self._ending = threading.Lock()
        self._in_trouble = threading.Event()
        self._verdict: Cause | None = None
        self._judged = threading.Event()
        self._step, self._moved = "", time.monotonic()
        self._number = 0
        self._answered = time.monotonic()
        self._main = threading.main_thread().ident
        self._woken, self._wakes = os.pipe()
        self._threads = [
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True)
            for target in (self._talk, self._judge)
        ]

    def allow(self, seconds: float) -> None:
        """Sets how long a rank may be silent."""
        self._timeout, self._interval = seconds, interval_seconds(seconds)
        self._what = f"not answered for {seconds:g} s"

    def start(self) -> None:
        """Begins to watch; the main thread calls it."""
        self._beat()
        os.set_blocking(self._wakes, False)
        with suppress(ValueError):  # only the main thread hears signals
            signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def reached(self, step: int) -> None:
        """Notes how far this rank is."""
        self._step, self._moved = str(step), time.monotonic()
        self._stepped.set()

    def close(self) -> None:
        """Ends the watch in good order: the others do not miss this rank."""
        if not self._closed.is_set():
            self._closed.set()
            self._stepped.set()
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
            os.write(self._wakes, bytes(1))
            # a thread that is in the store's C++ while the interpreter ends would abort the process
            for thread in self._threads:
                thread.join(_TELL_SECONDS)
            self._timer.stop()
            key, bye = self._key(self._meeting.rank), Beat(_BYE, "", "", "").encode()
            _briefly(lambda: self._meeting.store.set(key, bye))

    def report(self, message: str) -> None:
        """Tells the others why this rank fails; they end with it, and say so."""

        def tell() -> None:
            if self._meeting.store.add("failures", 1) == 1:
                own = f"rank {self._meeting.rank} on {socket.gethostname()}\t{message}"
                self._meeting.store.set("failure", own)

        _briefly(tell)

    def cause(self, has_waited: bool) -> Cause | None:
        """Why this rank's communication failed: another rank's failure, or who is silent.

        Takes some beats, as nothing else tells a rank that has been killed from one that is late.

        Args:
            has_waited: the communication failed by its time-out.
        """
        self._what = f"not answered for {self._timeout:g} s" if has_waited else "stopped answering"
        self._in_trouble.set()
        deadline = time.monotonic() + 5 * self._interval + _TELL_SECONDS
        while time.monotonic() < deadline and not ending.stop_received:
            if self._judged.wait(self._interval / 4):
                break
        return self._verdict

    # --- the talker ------------------------------------------------------------------------------

    def _talk(self) -> None:
        seen = _Seen(looked=0.0, changed=time.monotonic())
        while not self._closed.is_set():
            self._stepped.wait(self._interval)
            self._stepped.clear()
            try:
                self._talk_once(seen)
            except RuntimeError:  # the connection is lost; the judge counts the seconds
                with suppress(RuntimeError):
                    if not self._closed.wait(self._interval):
                        self._store = self._meeting.clone(self._interval)
            self._closed.wait(SHORTEST_SECONDS)

    def _talk_once(self, seen: _Seen) -> None:
        if self._closed.is_set():
            return
        self._beat()
        now = time.monotonic()
        if now - seen.looked > 3 * self._interval:  # stopped itself, it could see nothing
            seen.changed = now
        if now - seen.looked >= self._interval or self._in_trouble.is_set():
            self._look(seen, now)
            seen.looked = self._answered = time.monotonic()

    def _look(self, seen: _Seen, now: float) -> None:
        """Looks at what others have found, and after the rank before this one."""
        if self._store.check(["verdict"]):
            self._find(self._verdict_told())
        elif self._store.check(["failure"]):
            # A rank that fails by itself in the same way is given time to say so.
            seen.failed = seen.failed or now
            if self._in_trouble.is_set() or now - seen.failed > self._interval:
                self._find(self._failure())
        elif self._in_trouble.is_set():
            silent = self._silent()
            self._find(self._accused(silent) if silent else self._behind())
        elif (before := self._before()) is not None:
            if before != seen.before:
                seen.before, seen.changed = before, now
            elif now - max(seen.changed, self._moved) > self._timeout and (
                silent := self._silent()
            ):
                self._find(self._accused(silent))

    def _find(self, cause: Cause | None) -> None:
        """Lets the main thread end with it where that waits for it; else ends the process."""
        self._verdict = cause
        if self._in_trouble.is_set():
            self._judged.set()
        elif cause is not None:
            self._end(cause)

    def _beat(self) -> None:
        self._number += 1
        beat = Beat(str(self._number), self._step, socket.gethostname(), self._where())
        self._store.set(self._key(self._meeting.rank), beat.encode())

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return ""
        code = frame.f_code
        return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"

    def _read(self, rank: int) -> Beat | None:
        key = self._key(rank)
        beat = Beat.decode(self._store.get(key)) if self._store.check([key]) else None
        self._answered = time.monotonic()
        return beat

    def _before(self) -> tuple[int, str] | None:
        """The nearest rank before this one that has not said good-bye, and its beat's number."""
        size = self._meeting.world_size
        for distance in range(1, size):
            rank = (self._meeting.rank - distance) % size
            beat = self._read(rank)
            if beat is None or beat.number != _BYE:
                return rank, beat.number if beat else ""
        return None

    def _silent(self) -> list[int]:
        """Every rank whose beat does not change over some beats."""
        others = [rank for rank in range(self._meeting.world_size) if rank != self._meeting.rank]
        before = {rank: self._read(rank) for rank in others}
        time.sleep(self._interval)
        self._beat()
        time.sleep(1.5 * self._interval)
        return [
            rank
            for rank, beat in before.items()
            if (now := self._read(rank)) is None
            or (beat is not None and beat.number == now.number != _BYE)
        ]

    def _failure(self) -> Cause:
        return Cause(*self._store.get("failure").decode().split("\t", 1))

    def _verdict_told(self) -> Cause:
        return Cause("", self._store.get("verdict").decode())

    def _accused(self, silent: list[int]) -> Cause:
        """The first verdict on silent ranks is everybody's."""
        self._store.compare_set("verdict", "", self._named(silent))
        return self._verdict_told()

    def _named(self, silent: list[int]) -> str:
        beats = {rank: self._read(rank) for rank in silent[:MOST_NAMED]}
        names = [f"rank {rank} on {beat.host if beat else '?'}" for rank, beat in beats.items()]
        steps = [beat.step or "none" for beat in beats.values() if beat]
        if (rest := len(silent) - MOST_NAMED) > 0:
            names.append(f"{rest} more ranks")
        has, last = ("has", "its last step was") if len(silent) == 1 else ("have", "last steps:")
        return (
            f"{', '.join(names)} {has} {self._what}; {last} {', '.join(steps)}. The process is "
            "stopped, is stuck or was killed, or its machine cannot be reached."
        )

    def _behind(self) -> Cause | None:
        """Who answers, but has made fewer steps than others."""
        beats = {rank: self._read(rank) for rank in range(self._meeting.world_size)}
        steps = {rank: int(beat.step) for rank, beat in beats.items() if beat and beat.step}
        late = [rank for rank, step in steps.items() if step < max(steps.values())]
        if not late:
            return None
        names = [
            f"rank {rank} on {beat.host} has made step {beat.step} and is at {beat.where}"
            for rank in late[:MOST_NAMED]
            if (beat := beats[rank]) is not None
        ]
        return Cause("", f"{'; '.join(names)}: others wait after step {max(steps.values())}.")

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat/{rank}"

    # --- the judge -------------------------------------------------------------------------------

    def _judge(self) -> None:
        last, interrupted = time.monotonic(), None
        while not self._closed.is_set():
            self._timer.wind_up(timer_seconds(self._timeout))
            ready = select.select([self._woken], [], [], self._interval)[0]
            now = time.monotonic()
            if ready and signal.SIGINT in os.read(self._woken, 64):
                interrupted = interrupted or now
            if interrupted and now - interrupted > STOP_SECONDS:
                os._exit(128 + signal.SIGINT)
            if now - last > 3 * self._interval:
                self._answered = now
            last = now
            if self._in_trouble.is_set():
                is_lost = now - self._answered > 3 * self._interval + _TELL_SECONDS / 2
            else:
                is_lost = now - max(self._answered, self._moved) > self._timeout
            if is_lost:
                self._find(self._no_store())
        self._timer.stop()

    def _no_store(self) -> Cause:
        assert self._meeting.server is not None
        host, port = self._meeting.server
        return Cause(
            "",
            f"rank 0 on {host} has not answered for {self._timeout:g} s (the ranks' store is "
            f"there, at port {port}): it or its torchrun is stopped or was killed, or the network "
            f"to it is cut; the last step here was {self._step or 'none'}.",
        )

    # --- the end ---------------------------------------------------------------------------------

    def _end(self, cause: Cause) -> None:
        """Ends this process from a thread: the main one waits for who does not come."""
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        self._verdict = cause
        self._judged.set()
        ending.hand_to_torchrun(f"error: {cause}")
        ending.complain([cause.message], who=cause.who)
        os._exit(1)

    def stand_down(self) -> bool:
        """The main thread ends the process itself; False when a thread is doing it already."""
        return self._ending.acquire(blocking=False)


def _briefly(tell: Callable[[], None]) -> None:
    """Tells the store something, if it answers: it may be what is lost."""

    def telling() -> None:
        with suppress(RuntimeError):
            tell()

    thread = threading.Thread(target=telling, daemon=True)
    thread.start()
    thread.join(_TELL_SECONDS)


class _KillTimer:
    """A POSIX timer that sends SIGKILL to this process, which works on a stopped one too."""

    def __init__(self) -> None:
        self._libc: Any = None
        self._timer = ctypes.c_void_p()
        # struct sigevent: value, signal, SIGEV_SIGNAL, padding
        event = ctypes.create_string_buffer(struct.pack("@qii48x", 0, signal.SIGKILL, 0))
        for library in (None, "librt.so.1"):  # in librt before glibc 2.34
            with suppress(OSError, AttributeError):
                libc = ctypes.CDLL(library)
                monotonic = time.CLOCK_MONOTONIC
                if libc.timer_create(monotonic, event, ctypes.byref(self._timer)) == 0:
                    self._libc = libc
                    return

    def wind_up(self, seconds: float) -> None:
        if self._libc is not None:
            whole = int(seconds)
            spec = struct.pack("@4l", 0, 0, whole, int((seconds - whole) * 1e9))
            self._libc.timer_settime(self._timer, 0, spec, None)

    def stop(self) -> None:
        self.wind_up(0)
