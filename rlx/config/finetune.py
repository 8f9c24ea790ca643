"""The section ``finetune``: learning from given answers, without rollouts. ``docs/finetuning.md`` explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlx.config.options import option

# The objectives that a command trains; the first one where the configuration names none.
COMMAND_OBJECTIVES: Mapping[str, tuple[str, ...]] = {"sft": ("sft",), "dpo": ("dpo", "ipo"), "rm": ("rm",)}
OBJECTIVES = tuple(objective for objectives in COMMAND_OBJECTIVES.values() for objective in objectives)
PAIRED = ("dpo", "ipo", "rm")
WITH_REFERENCE = ("dpo", "ipo")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """Supervised fine-tuning, preference optimisation and reward models: `rlx sft`, `rlx dpo`, `rlx rm`."""

    objective: str = option(
        "none", "what is trained; none: reinforcement learning, or the command's own", choices=("none", *OBJECTIVES)
    )
    epochs: float | None = option(None, "passes over data.train; none: run.steps optimizer steps", above=0)
    examples_per_step: int = option(32, "examples (pairs) of one optimizer step", minimum=1)
    max_tokens: int = option(1024, "limit of one sequence, prompt and answer", minimum=2)
    overlong: str = option("drop", "what becomes of longer ones, counted either way", choices=("drop", "truncate"))
    turns: str = option("all", "assistant turns of a chat that are learnt; pairs always take the last", choices=("all", "last"))
    response_key: str = option("response", "column of the answer, where the rows are no whole chats")
    chosen_key: str = option("chosen", "column of a pair's better answer")
    rejected_key: str = option("rejected", "column of a pair's worse answer")
    beta: float = option(0.1, "dpo: scale of the implicit reward; ipo: its tau", minimum=0)
    label_smoothing: float = option(0.0, "dpo: share of the pairs taken to be the wrong way round", minimum=0, below=0.5)
    center_coefficient: float = option(0.0, "rm: weight of (chosen + rejected)^2, which keeps scores around 0", minimum=0)

    @property
    def is_paired(self) -> bool:
        """Whether an example is a pair of answers."""
        return self.objective in PAIRED

    @property
    def command(self) -> str:
        """The command that trains the objective, ``train`` for none."""
        found = (name for name, objectives in COMMAND_OBJECTIVES.items() if self.objective in objectives)
        return next(found, "train")
