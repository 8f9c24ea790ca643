"""How long the parts of a step take, as the ``perf/..._s`` metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Adds up wall-clock seconds by name; make one for each step.

    ``with timer("rollout"):`` adds to ``perf/rollout_s``, also when the block raises. ``clock`` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """The seconds so far by metric name, with ``perf/step_s``: all time since the timer was made."""
        seconds = {f"perf/{name}_s": total for name, total in self._seconds.items()}
        return seconds | {"perf/step_s": self._clock() - self._start}
