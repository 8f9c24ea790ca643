"""What a launcher looks at before it starts anything: models, tokenizer, prompts or examples, verifier, engines.

Every command that starts a run calls ``preflight``; ``rlx check`` calls ``inspect``, which is all of it but for what only this
machine or rows further down can show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from math import ceil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.cluster.began_with import other_content
from rlx.cluster.checks.function_trial import trial_problems
from rlx.cluster.checks.models import (
    model_problems,
    vocabulary_problems,
    vocabulary_warnings,
    weight_warnings,
)
from rlx.cluster.checks.services import check_places, check_writable, engine_problems, environment_problems
from rlx.cluster.resumption import find_resumption, steps_problem, with_template_date
from rlx.config.checks.unused import schedule_warnings, unused_keys
from rlx.config.load import ConfigError
from rlx.config.schema import Config
from rlx.data.examples import check_examples
from rlx.data.prompts import check_prompts
from rlx.data.rows import Look
from rlx.data.tokenizer import end_ids, tokenizer_of
from rlx.processes.rundir import check_run_dir
from rlx.rewards.base import Verifier, check_prompt
from rlx.rewards.registry import label_use, make_verifier, user_functions


def preflight(config: Config) -> Config:
    """The configuration to run, with what it leaves open filled in (the steps of ``finetune.epochs``, the day of templates), and
    for an evaluation alone the folder ``eval`` of the run's, so that the run itself may be there and go on.

    Raises ConfigError with everything found wrong that the configuration alone does not show. Warnings, and what is different
    in a run that goes on, are told on standard error.
    """
    check_run_dir(config)  # before rows are read, which may take minutes
    check_places(config)
    config = with_template_date(config)
    found = inspect(config)
    found.say_warnings()
    found.attempt(lambda: found.problems.extend(environment_problems(config)))
    found.attempt(lambda: check_writable(config))
    if found.problems:
        raise ConfigError(found.problems)
    if config.evaluation.only:
        find_resumption(config)
        return replace(config, run=replace(config.run, dir=str(Path(config.run.dir) / "eval")))
    if config.is_finetuning and config.finetune.epochs is not None:
        # As many steps as deal every example so many times.
        steps = max(1, ceil(config.finetune.epochs * found.num_examples / config.finetune.examples_per_step))
        config = replace(config, run=replace(config.run, steps=steps))
    resumption = find_resumption(config)
    if resumption is not None:
        problems = [*steps_problem(resumption, config), *other_content(resumption, config)]
        if problems:
            raise ConfigError(problems)
        for note in resumption.notes:
            print(f"rlx: {note}", file=sys.stderr, flush=True)
    return config


def resumption_problems(config: Config, num_rows: int | None) -> Sequence[str]:
    """Why ``run.resume=auto`` could not go on, for those who start nothing; files of more than ``num_rows`` are not compared."""
    try:
        found = find_resumption(config)
    except ConfigError as error:
        return error.problems
    if found is None:
        return []
    # How many steps some epochs are is known to those who read all rows.
    has_steps = not config.is_finetuning or config.finetune.epochs is None
    return [*(steps_problem(found, config) if has_steps else []), *other_content(found, config, num_rows)]


@dataclass(slots=True, kw_only=True)
class Findings:
    """``problems`` forbid to start, ``warnings`` are for the user to see. ``num_examples`` is how many rows of data.train can be
    learnt from, when fine-tuning."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_examples: int = 0

    def attempt(self, check: Callable[[], object]) -> None:
        """A ValueError of ``check`` is a problem."""
        try:
            check()
        except ValueError as error:
            if str(error) not in self.problems:  # a tokenizer that cannot be loaded is wanted more than once
                self.problems.append(str(error))

    def say_warnings(self) -> None:
        for warning in self.warnings:
            print(f"rlx: warning: {warning}", file=sys.stderr, flush=True)


def inspect(config: Config, num_rows: int | None = None) -> Findings:
    """Look at everything that the run will read, of data files at the first ``num_rows`` rows (None: all). Starts nothing."""
    return _Inspection(config, num_rows).run()


class _Inspection:
    def __init__(self, config: Config, num_rows: int | None) -> None:
        self._config, self._num_rows = config, num_rows
        self._found = Findings()

    def run(self) -> Findings:
        config, found = self._config, self._found
        found.warnings += unused_keys(config, self._arch)
        if not config.evaluation.only and config.finetune.epochs is None:
            found.warnings += schedule_warnings(config)
        found.problems += model_problems(config)
        found.warnings += weight_warnings(config, self._arch)
        found.attempt(self._tokens)
        found.attempt(lambda: end_ids(config.model.path))
        if config.is_finetuning:
            found.attempt(self._examples)
        else:
            found.attempt(self._algorithm)
            found.attempt(self._prompts)
            found.problems += engine_problems(config, self._num_rows)
        return found

    @cached_property
    def _arch(self) -> Architecture:
        return read_architecture(self._config.model.path)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self._config)

    def _tokens(self) -> None:
        self._found.problems += vocabulary_problems(self._tokenizer, self._arch)
        self._found.warnings += vocabulary_warnings(self._tokenizer, self._arch)

    def _examples(self) -> None:
        config, look = self._config, Look(num_rows=self._num_rows, check_ids=self._arch.check_ids)
        if not config.evaluation.only:
            self._found.num_examples = self._looked("data.train", config.examples_path, look)
        if config.evaluation.data is not None:
            self._looked("evaluation.data", config.evaluation.data, look)

    def _looked(self, key: str, path: str, look: Look) -> int:
        try:
            return check_examples(path, self._config, self._tokenizer, look)
        except ValueError as error:
            self._found.problems.append(f"{key}: {error}")
            return 0

    def _algorithm(self) -> None:
        algorithm = self._config.algorithm
        names = {"algorithm.loss": algorithm.loss, "algorithm.advantages": algorithm.advantages}
        named = {} if self._config.evaluation.only else {key: name for key, name in names.items() if name is not None}
        if named and self._can_import(named.items()):
            import_module("rlx.algos.registry").try_algorithm(algorithm)

    def _can_import(self, functions: Iterable[tuple[str, str]]) -> bool:
        """Whether importing these files leaves this process alive and its own master."""
        problems = list(trial_problems(functions))
        self._found.problems += problems
        return not problems

    def _make_verifier(self, made: list[Verifier]) -> None:
        if self._can_import(("reward.name", name) for name in user_functions(self._config.reward)):
            made.append(make_verifier(self._config.reward))

    def _prompts(self) -> None:
        config = self._config
        made: list[Verifier] = []
        self._found.attempt(lambda: self._make_verifier(made))
        # Millions of prompts that no evaluation asks need not be read.
        read = replace(config, data=replace(config.data, train=None, sources={})) if config.evaluation.only else config
        look = Look(
            num_rows=self._num_rows,
            check_ids=self._arch.check_ids,
            check_prompt=lambda prompt: check_prompt(made[0], prompt) if made else None,
        )
        self._found.problems += check_prompts(read, self._tokenizer, lambda source: label_use(config.reward, source), look)
