"""Steps to the end, with checkpoints when due: what every trainer's loop has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from rlx.config.schema import CheckpointConfig
from rlx.obs.log import phase
from rlx.types.rollout import StepReport


class Trainer(Protocol):
    """Something that learns step by step; ``state`` / ``load_state`` are what a checkpoint keeps of the driver."""

    num_steps_done: int

    def step(self) -> StepReport: ...

    def state(self) -> dict[str, object]: ...

    def load_state(self, state: Mapping[str, object]) -> None: ...


def iterate(
    trainer: Trainer,
    *,
    num_steps: int,
    report: Callable[[StepReport], None],
    save: Callable[[], None],
    checkpoint: CheckpointConfig,
    stop_asked: Callable[[], bool],
) -> None:
    """Step to ``num_steps`` (counting those done before a resume), saving as ``checkpoint`` says.

    Once ``stop_asked`` says so it saves and returns after the step that is under way.
    """
    saved = trainer.num_steps_done
    while trainer.num_steps_done < num_steps and not stop_asked():
        with phase("step", trainer.num_steps_done + 1):
            report(trainer.step())
        if checkpoint.every and trainer.num_steps_done % checkpoint.every == 0:
            save()
            saved = trainer.num_steps_done
    if (checkpoint.at_end or trainer.num_steps_done < num_steps) and saved != trainer.num_steps_done:
        save()
