"""Questions of reasoning-gym, made from a seed (install rlx's extra ``tasks``).

A row holds the question, its answer as label, and in the column ``reasoning_gym`` what its own scorer needs: the task, its
arguments and the entry as it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import ModuleType

from rlx.config.sources import TASK_PREFIX
from rlx.data.rows import Row

# Evaluation takes seeds from here on unless it is given one: question i of seed s is question i - 1 of seed s + 1, so that
# neighbouring seeds would share nearly all of their questions.
EVALUATION_SEEDS = 10**9


def read_task(
    task: str, args: Mapping[str, object], default_seed: int, prompt_key: str, label_key: str
) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each question of ``task``; ``where`` names it for errors.

    ``args`` are the task's own arguments with ``size`` (500 questions unless given) and ``seed``. Raises ValueError without
    reasoning-gym, for a task it does not have, or arguments that do not fit.
    """
    args = {"seed": default_seed, **args}
    path = f"{TASK_PREFIX}{task}"
    gym = _reasoning_gym(path)
    if task not in gym.factory.DATASETS:
        raise ValueError(f"{path}: reasoning-gym has no such task; it has {', '.join(sorted(gym.factory.DATASETS))}")
    try:
        dataset = gym.create_dataset(task, **args)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{path}: the arguments {args} do not fit: {error}") from error
    return _rows(path, dataset, {"task": task, "args": args}, (prompt_key, label_key))


def _rows(path: str, dataset: object, origin: Mapping[str, object], keys: tuple[str, str]) -> Iterator[tuple[str, Row]]:
    prompt_key, label_key = keys
    for number, entry in enumerate(dataset):  # type: ignore[var-annotated, arg-type]
        metadata = {name: value for name, value in entry["metadata"].items() if name not in keys}
        known = {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
        row = {**metadata, prompt_key: entry["question"], label_key: entry["answer"], "reasoning_gym": {**origin, "entry": known}}
        yield f"{path}: question {number}", row


def _reasoning_gym(path: str) -> ModuleType:
    if find_spec("reasoning_gym") is None:
        raise ValueError(f"{path} needs the package reasoning-gym (pip install 'rlx[tasks]')")
    import reasoning_gym

    return reasoning_gym  # type: ignore[no-any-return]
