"""The source of prompts: deals the questions of a mixture in a seeded order, epoch after epoch.

Whose turn it is follows from how many prompts each source has given (``rlx.data.mixture``); the order within a source from
(seed, name, epoch) alone (``rlx.data.order``). So a few integers a source resume it bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import DataConfig, EvaluationConfig
from rlx.config.sources import EvaluationSetConfig, SourceConfig
from rlx.data.images.reader import ImageReader
from rlx.data.mixture import next_source, shares_of
from rlx.data.order import Curriculum, EpochOrder
from rlx.data.questions import (
    Question,
    Source,
    check_questions,
    columns_of,
    fingerprint,
    read_questions,
    rendered_fingerprint,
)
from rlx.data.rows import EVERY_ROW, Look
from rlx.data.tasks import EVALUATION_SEEDS
from rlx.data.tokenizer import GIVE_BACK, check_template, template_digest
from rlx.obs.log import logger
from rlx.types.rollout import LabelUse, Prompt


class PromptSource:
    """Deals the prompts of ``config.train``, or of the mixture ``config.sources``.

    ``drops`` counts prompts over the length limit by what became of them (``prompt_too_long``, ``prompt_truncated``). Raises
    ValueError for a source that cannot be used, as ``read_questions``.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, images: ImageReader | None = None
    ) -> None:
        self.drops: Counter[str] = Counter()
        self._dealers: list[_Dealer] = []
        for name, source in config.by_name.items():
            questions, drops = read_questions(source, config, tokenizer, default_seed=seed, images=images)
            self.drops += drops
            self._dealers.append(_Dealer(name, source, questions, seed, config))
        self._template = template_digest(tokenizer)
        self._shares = shares_of([dealer.source.weight for dealer in self._dealers])
        self._next_id = 0

    def __len__(self) -> int:
        """Usable prompts in an epoch of every source."""
        return sum(len(dealer.questions) for dealer in self._dealers)

    def next(self, num: int) -> list[Prompt]:
        """The next ``num`` prompts; each source goes over into its next epoch as often as needed."""
        return [self._draw() for _ in range(num)]

    def metrics(self) -> dict[str, float]:
        """``data/epoch`` and ``data/epoch/NAME``: epochs dealt of each source, in fractions (the first: of a single one);
        ``data/DROP``: prompts over the length limit."""
        epochs = {dealer.name: dealer.order.epochs for dealer in self._dealers}
        found = {f"data/epoch/{name}" if name else "data/epoch": value for name, value in epochs.items()}
        return found | {f"data/{reason}": float(count) for reason, count in self.drops.items()}

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on exactly here (JSON-able)."""
        return {
            "next_prompt_id": self._next_id,
            "template": self._template,
            "sources": {dealer.name: dealer.state() for dealer in self._dealers},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; ValueError when the sources hold other prompts, weights or orders now."""
        saved, present = ([name or "data.train" for name in names] for names in (state["sources"], self.state()["sources"]))
        if saved != present:
            raise ValueError(f"data.sources are {', '.join(present)}, but were {', '.join(saved)} when the state was saved")
        check_template(state, self._template)
        for dealer in self._dealers:
            dealer.load_state(state["sources"][dealer.name])
        self._next_id = int(state["next_prompt_id"])

    def _draw(self) -> Prompt:
        dealer = self._dealers[next_source(self._shares, [dealer.num_dealt for dealer in self._dealers])]
        prompt = dealer.next_question().ask(self._next_id, dealer.name or dealer.source.path)
        self._next_id += 1
        return prompt


class _Dealer:
    """One source: its questions and where it is among them."""

    def __init__(self, name: str, source: SourceConfig, questions: list[Question], seed: int, config: DataConfig) -> None:
        self.name, self.source, self.questions = name, source, questions
        levelled = bool(source.curriculum_key or config.curriculum_key)
        curriculum = Curriculum(levels=[question.level for question in questions], num_epochs=config.curriculum_epochs)
        self.order = EpochOrder(
            len(questions),
            seed=f"{seed}/{name}" if name else seed,
            shuffle=config.shuffle,
            curriculum=curriculum if levelled else None,
        )
        self.num_dealt = 0
        # What the same numbers would mean something else without.
        self._identity = {
            "usable prompts": len(questions),
            "rows": fingerprint(questions),
            "weight": source.weight,
            "shuffle": config.shuffle,
            "curriculum epochs": config.curriculum_epochs if levelled else 0,
        }

    def next_question(self) -> Question:
        self.num_dealt += 1
        (row,) = self.order.next(1)
        return self.questions[row]

    def state(self) -> dict[str, Any]:
        return {"num_dealt": self.num_dealt, "order": self.order.state(), **self._identity}

    def load_state(self, state: Mapping[str, Any]) -> None:
        identity, advice = dict(self._identity), GIVE_BACK
        if "rows" not in state:  # an older checkpoint
            del identity["rows"]
            identity["fingerprint"] = rendered_fingerprint(self.questions)
            advice = f"{GIVE_BACK} (a chat template that writes a date needs data.template_date, the day of the first start)"
        changed = [name for name, value in identity.items() if state.get(name) != value]
        if changed:
            was, now = ({name: of.get(name) for name in changed} for of in (state, identity))
            key = f"data.sources.{self.name}.path" if self.name else "data.train"
            raise ValueError(
                f"{key}: {self.source.path} is not what it was when the state was saved: {was} then, {now} now; {advice}"
            )
        self.order.load_state(state["order"])
        self.num_dealt = int(state["num_dealt"])


def evaluation_prompts(
    name: str,
    one: EvaluationSetConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    images: ImageReader | None = None,
) -> tuple[list[Prompt], Counter[str]]:
    """The first ``one.max_prompts`` usable prompts of an evaluation set in file order, their row numbers among the usable
    ones as ids, and how many of the whole set were over the length limit."""
    questions, drops = read_questions(one, data, tokenizer, default_seed=EVALUATION_SEEDS + seed, images=images)
    source = name or one.path
    return [question.ask(index, source) for index, question in enumerate(questions[: one.max_prompts])], drops


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFiles:
    """All that a run takes prompts from: sources to train on and evaluation sets. ``seed`` is the run's; ``images`` reads those
    of rows."""

    data: DataConfig
    evaluation: EvaluationConfig
    tokenizer: PreTrainedTokenizerBase
    seed: int
    images: ImageReader | None = None

    def first(self, source: str | None, num: int) -> list[Prompt]:
        """The first ``num`` usable prompts, in file order, of each source of training, or of the source or evaluation set called
        ``source``. ValueError for a name that is neither's."""
        named: dict[str, tuple[Source, int]] = {
            **{name: (one, EVALUATION_SEEDS + self.seed) for name, one in self.evaluation.by_name.items()},
            **{name: (one, self.seed) for name, one in self.data.by_name.items()},
        }
        if source is not None and source not in named:
            raise ValueError(f"no source is called {source!r}; there are {', '.join(filter(None, named)) or 'none with a name'}")
        prompts: list[Prompt] = []
        for name in self.data.by_name if source is None else [source]:
            one, seed = named[name]
            questions, _ = read_questions(one, self.data, self.tokenizer, seed, num, self.images)
            prompts += [question.ask(len(prompts) + index, name or one.path) for index, question in enumerate(questions)]
        return prompts

    def problems(self, use_of: Callable[[str], LabelUse], look: Look = EVERY_ROW) -> list[str]:
        """What is wrong with them, a line for each source and evaluation set. ``use_of`` says of a source's name what its reward
        does with labels: where it needs them, some rows must have one. ``look`` says how rows are looked at."""
        found = []
        seeds = ((self.data.by_name, self.seed), (self.evaluation.by_name, EVALUATION_SEEDS + self.seed))
        for name, one, seed in ((name, one, seed) for sources, seed in seeds for name, one in sources.items()):
            use = use_of(name or one.path)
            try:
                is_labelled = check_questions(
                    one, self.data, self.tokenizer, use, replace(look, source=name, seed=seed), self.images
                )
            except ValueError as error:
                found.append(str(error))
                continue
            key = columns_of(one, self.data).label_key
            if is_labelled is False:
                found += _without_labels(one.path, key, use)
            if is_labelled is None and (use.is_needed or use.is_handed_on):
                first = "the first %d rows have no %r (data.label_key)"
                logger.warning(f"rlx: warning: %s: {first}; whether others have is not known", one.path, look.num_rows, key)
        return found


def _without_labels(path: str, key: str, use: LabelUse) -> list[str]:
    """What to say of rows that have no label at all. A key that was named and is nowhere is wrong; the default one may be."""
    if use.is_needed:
        return [f"{path}: the reward compares with labels, but the rows have no {key!r} (data.label_key)"]
    if use.is_handed_on and key != DataConfig().label_key:
        return [f"{path}: no row has a {key!r} (data.label_key), so the reward function would get None as every label"]
    if use.is_handed_on:
        logger.warning("rlx: warning: %s: no row has a %r (data.label_key); the reward function gets None as label", path, key)
    return []
