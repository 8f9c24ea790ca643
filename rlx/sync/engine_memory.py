"""Which co-located engines have given memory back, and what: SGLang ends itself when it is asked to take what it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlx.sync.group import Endpoint, Engine

WEIGHTS, KEY_VALUES = "weights", "kv_cache"


class EngineMemory:
    """The lead's record, kept over changes of the fleet; an engine that was started again holds all its memory.

    ``tags`` is what engines give back while the trainers work. May be used for several engines at once.
    """

    def __init__(self, tags: Sequence[str] = ()) -> None:
        self.tags = tuple(tags)
        self._released: dict[Endpoint, set[str]] = {}

    def release(self, engine: Engine, tags: Sequence[str] | None = None) -> None:
        """Pause the engine and let it give back ``tags`` (all of ours), except what it gave before."""
        given = self._released.setdefault(engine.endpoint, set())
        wanted = [tag for tag in (self.tags if tags is None else tags) if tag in self.tags and tag not in given]
        if wanted:
            engine.control.stop()
            engine.control.release_memory(wanted)
            given.update(wanted)

    def resume(self, engine: Engine, tags: Sequence[str]) -> None:
        """Let it take back those of ``tags`` that it gave."""
        given = self._released.get(engine.endpoint, set())
        wanted = [tag for tag in tags if tag in given]
        if wanted:
            engine.control.resume_memory(wanted)
            given.difference_update(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Engines on the trainers' own devices: what they have given back, and how this rank makes room for them again."""

    memory: EngineMemory
    make_room: Callable[[], None]
