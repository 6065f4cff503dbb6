"""Joules of a piece of work, from a source that counts energy or says power, and above idle.

    meter = EnergyMeter.find(Place(device="cpu"))
    meter.measure_idle()
    with meter:
        work()
    print(meter.joules, meter.joules_above_idle, meter.reason)

A source is read in a thread. Power is integrated by the trapezoidal rule over the times of the
readings; nothing is continued beyond the last one. A figure that cannot be had is None, and
`reason` says why. Imports neither torch nor megatron-core.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from qwen2_ascend.runtime.power import (
    NoPowerSource,
    Place,
    PowerReadingError,
    PowerSource,
)
from qwen2_ascend.runtime.power_sources import find_power_source

MISSES = 3
"""Readings in a row that may fail before the source counts as lost."""
FEWEST_READINGS = 3
"""The fewest readings of power whose integral says something."""


class Energy(NamedTuple):
    """What a training log says of an interval; of the whole job."""

    joules_per_token: float
    joules_per_token_above_idle: float
    watts: float
    idle_watts: float


def format_energy(energy: Energy) -> str:
    """The energy for a line of the log."""
    return (
        f"{energy.joules_per_token:.4g} J/token "
        f"({energy.joules_per_token_above_idle:.4g} above idle) | {energy.watts:.1f} W"
    )


class EnergyCurve:
    """Energy over time, from readings.

    Args:
        counts_energy: readings are joules since some moment, else watts.
    """

    def __init__(self, counts_energy: bool) -> None:
        self._counts_energy = counts_energy
        self._times: list[float] = []
        self._readings: list[float] = []
        self._joules: list[float] = []
        """Joules from the first reading to each."""
        self.num_readings = 0

    @property
    def first_time(self) -> float:
        """The time of the first reading that is kept."""
        return self._times[0]

    @property
    def last_time(self) -> float:
        """The time of the last reading."""
        return self._times[-1]

    def add(self, moment: float, reading: float) -> None:
        """Takes a reading, later than all before.

        Raises:
            PowerReadingError: a counter went back.
        """
        joules = 0.0
        if self._times:
            before, seconds = self._readings[-1], moment - self._times[-1]
            step = reading - before if self._counts_energy else seconds * (before + reading) / 2
            if step < 0:
                raise PowerReadingError(
                    f"the energy counter went back from {before:g} to {reading:g} J"
                )
            joules = self._joules[-1] + step
        self._times.append(moment)
        self._readings.append(reading)
        self._joules.append(joules)
        self.num_readings += 1

    def joules(self, begin: float, end: float) -> float:
        """Energy between two moments, both within the readings."""
        return self._until(end) - self._until(begin)

    def forget_before(self, moment: float) -> None:
        """Drops readings that no moment from this one on needs."""
        keep = max(bisect.bisect_right(self._times, moment) - 1, 0)
        del self._times[:keep], self._readings[:keep], self._joules[:keep]

    def _until(self, moment: float) -> float:
        i = bisect.bisect_right(self._times, moment) - 1
        assert i >= 0 and moment <= self._times[-1], "outside of the readings"
        if i == len(self._times) - 1:
            return self._joules[i]
        seconds, length = moment - self._times[i], self._times[i + 1] - self._times[i]
        if self._counts_energy:
            return self._joules[i] + seconds / length * (self._joules[i + 1] - self._joules[i])
        # power is taken to be linear between readings: the trapezoidal rule for a part
        slope = (self._readings[i + 1] - self._readings[i]) / length
        return self._joules[i] + seconds * (self._readings[i] + slope * seconds / 2)


class EnergyMeter:
    """Measures what is done between `start` and `stop`, again and again.

    Args:
        source: what is read; None for a meter that has no figures.
        reason: why there is no source.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        source: PowerSource | None,
        reason: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert (source is None) == (reason is not None)
        self._source = source
        self._clock = clock
        self._fault = reason
        self._misses = 0
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._begin: float | None = None
        """The first reading since the last `start`; the curve ends with the last one."""
        self._curve = self._new_curve()
        self.idle_watts: float | None = None
        """Mean power while nothing was done; `measure_idle` finds it."""

    @classmethod
    def find(cls, place: Place) -> EnergyMeter:
        """A meter of the device; one without figures where nothing measures it."""
        try:
            return cls(find_power_source(place))
        except NoPowerSource as reason:
            return cls(None, str(reason))
        except Exception as error:  # as in `read_now`: it ends the measuring, never the run
            return cls(None, f"looking for a power source failed: {error!r}.")

    @property
    def name(self) -> str | None:
        """What is measured and by what; None without a source."""
        return self._source.name if self._source else None

    @property
    def reason(self) -> str | None:
        """Why `joules` is None; None when it is a figure."""
        if self._fault is not None:
            return self._fault
        if self._begin is None:
            return "nothing has been measured yet."
        return self._too_short()

    @property
    def joules(self) -> float | None:
        """Joules from `start` to `stop` or the last reading; None where that was not measured."""
        with self._lock:
            if self.reason is not None or self._begin is None:
                return None
            return self._curve.joules(self._begin, self._curve.last_time)

    @property
    def seconds(self) -> float | None:
        """How long `joules` took."""
        with self._lock:
            if self._begin is None or self._fault is not None:
                return None
            return self._curve.last_time - self._begin

    @property
    def watts(self) -> float | None:
        """Mean power."""
        joules, seconds = self.joules, self.seconds
        return joules / seconds if joules is not None and seconds else None

    @property
    def joules_above_idle(self) -> float | None:
        """`joules` less what would have been used in that time with nothing to do."""
        joules, seconds, idle = self.joules, self.seconds, self.idle_watts
        if joules is None or seconds is None or idle is None:
            return None
        return joules - idle * seconds

    @property
    def idle_seconds(self) -> float:
        """How long `measure_idle` takes by itself."""
        period = self._source.period_seconds if self._source else 0.0
        return min(max(1.0, 4 * period), 5.0)

    def measure_idle(self, seconds: float | None = None) -> float | None:
        """Waits, and finds the mean power while the caller does nothing.

        Args:
            seconds: how long; by default `idle_seconds`.

        Returns:
            Watts, or None where there are none, with the `reason`.
        """
        self.start()
        if self._fault is None:
            time.sleep(self.idle_seconds if seconds is None else seconds)
        self.stop()
        self.idle_watts = self.watts
        return self.idle_watts

    def start(self) -> None:
        """Reads the source, and goes on reading it in a thread."""
        assert self._thread is None, "it is running"
        if self._fault is not None:
            return
        self._curve, self._begin, self._misses = self._new_curve(), None, 0
        self._stop.clear()
        # a first reading that fails is a loss: without it the beginning is not measured
        if self.read_now(must=True):
            self._begin = self._curve.last_time
            self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Reads a last time, and stops reading."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self.read_now(must=True)

    def __enter__(self) -> EnergyMeter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- for those who ask for parts of a running measurement ------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether there will be no more figures."""
        return self._fault is not None

    @property
    def counts_energy(self) -> bool:
        """Whether a reading is exact at its moment, and quickly had."""
        return self._source is not None and self._source.counts_energy

    def read_now(self, *, must: bool = False) -> bool:
        """Takes a reading in the caller's thread.

        Args:
            must: the source is lost when this reading fails.

        Returns:
            Whether there is one.
        """
        with self._lock:
            if self._fault is not None or self._source is None:
                return False
            asked = self._clock()
            try:
                reading = self._source.read()
                self._curve.add((asked + self._clock()) / 2, reading)
            except Exception as error:  # whatever it is ends the measuring, never the run
                self._misses += 1
                if must or self._misses >= MISSES or not isinstance(error, PowerReadingError):
                    self._fault = f"the power source was lost: {error}."
                return False
            self._misses = 0
            return True

    def between(self, begin: float, end: float) -> float | None:
        """Joules between two moments of `clock`; None unless both are within the readings."""
        with self._lock:
            curve = self._curve
            if self._fault is not None or not curve.num_readings:
                return None
            is_within = curve.first_time <= begin <= end <= curve.last_time
            return curve.joules(begin, end) if is_within else None

    def forget_before(self, moment: float) -> None:
        """Drops readings that are no longer asked for; `joules` is then from there on."""
        with self._lock:
            if self._begin is not None:
                self._curve.forget_before(moment)
                self._begin = max(self._begin, self._curve.first_time)

    def _sample(self) -> None:
        assert self._source is not None
        while not self._stop.wait(self._source.period_seconds) and self._fault is None:
            self.read_now()

    def _new_curve(self) -> EnergyCurve:
        return EnergyCurve(self._source is not None and self._source.counts_energy)

    def _too_short(self) -> str | None:
        if self._source is None or self._source.counts_energy:
            return None
        if self._curve.num_readings >= FEWEST_READINGS:
            return None
        return (
            f"too short to be measured: {self._curve.num_readings} reading(s) of {self.name}, "
            f"which is read every {self._source.period_seconds:g} s."
        )
