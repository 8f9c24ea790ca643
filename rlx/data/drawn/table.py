"""The table of drawn tasks, their arguments checked, and their questions as rows. A new task is a file beside this one and a row
here."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import Protocol, cast, get_type_hints

from rlx.config.options import broken_limits
from rlx.config.schema import DataConfig
from rlx.config.sources import DRAWN_PREFIX
from rlx.data.drawn.canvas import Drawn, png
from rlx.data.drawn.count import Count
from rlx.data.drawn.geometry import Geometry
from rlx.data.drawn.number import Number
from rlx.data.rows import Row

DEFAULT_SIZE = 500


class Task(Protocol):
    """Draws one picture after the other; what it takes are its fields."""

    def draw(self, draw: random.Random) -> Drawn:
        """The next picture and its question."""


TASKS: Mapping[str, type[Task]] = {"count": Count, "number": Number, "geometry": Geometry}


def read_drawn(task: str, args: Mapping[str, object], default_seed: int, data: DataConfig) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each question of ``task``: a chat with one image, the answer as label, the picture's PNG, and how
    hard it is.

    ``args`` are the task's own with ``size`` and ``seed``. Question i of a seed shares nothing with any question of another.
    Raises ValueError for a task that is not there, arguments that do not fit, and columns that have no name.
    """
    path = f"{DRAWN_PREFIX}{task}"
    if task not in TASKS:
        raise ValueError(f"{path}: there is no such task; there are {', '.join(f'{DRAWN_PREFIX}{name}' for name in TASKS)}")
    if data.images_key is None:
        raise ValueError(f"{path}: its pictures need a column: data.images_key is null")
    own = {name: value for name, value in args.items() if name not in ("size", "seed")}
    try:
        seed, size = _whole(args.get("seed", default_seed), "seed"), _whole(args.get("size", DEFAULT_SIZE), "size")
        if size < 1:
            raise ValueError(f"size = {size} must be at least 1")
        made = _made(TASKS[task], own)
    except ValueError as error:
        raise ValueError(f"{path}: the arguments {dict(args)} do not fit: {error}") from error
    return _rows(path, made, (seed, size), data, data.images_key)


def _rows(path: str, task: Task, seed_size: tuple[int, int], data: DataConfig, images_key: str) -> Iterator[tuple[str, Row]]:
    seed, size = seed_size
    for number in range(size):
        drawn = task.draw(random.Random(f"{path} {seed} {number}"))
        content = [{"type": "image"}, {"type": "text", "text": drawn.question}]
        row = {
            **drawn.facts,
            data.messages_key: [{"role": "user", "content": content}],
            images_key: [png(drawn.picture)],
            data.label_key: drawn.answer,
        }
        yield f"{path}: question {number}", row


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def _made(task: type[Task], args: Mapping[str, object]) -> Task:
    """The task with these arguments; ValueError for one that it does not take, or beyond its limits."""
    # A task's arguments are a dataclass, which a protocol cannot say.
    fields = {field.name: field for field in dataclasses.fields(task)}  # type: ignore[arg-type]
    kinds = get_type_hints(task)
    for name, value in args.items():
        if name not in fields:
            raise ValueError(f"it takes no {name}; it takes size, seed, {', '.join(fields)}")
        kind, metadata = kinds[name], fields[name].metadata
        if type(value) is not kind and not (kind is float and type(value) is int):
            word = {int: "a whole number", float: "a number", str: "text"}[kind]
            raise ValueError(f"{name} must be {word}, got {value!r}")
        if metadata["choices"] and value not in metadata["choices"]:
            raise ValueError(f"{name} must be one of {', '.join(metadata['choices'])}, got {value!r}")
        if kind is not str and (broken := broken_limits(cast(float, value), metadata["limits"])):
            raise ValueError(f"{name} must be {' and '.join(broken)}, got {value}")
    return task(**args)
