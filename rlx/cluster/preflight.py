"""What a launcher looks at before it starts anything: models, tokenizer, prompts or examples, verifier, engines.

Every command that starts a run calls ``preflight``; ``rlx check`` calls ``inspect``, which is all of it but for what only this
machine or rows further down can show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from math import ceil
from pathlib import Path

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
from rlx.config.parts import EngineSettings, loaded_models, written_folders
from rlx.config.schema import Config
from rlx.data.examples import ExampleReader, check_examples
from rlx.data.images.reader import image_reader
from rlx.data.prompts import PromptFiles
from rlx.data.rows import Look
from rlx.data.tokenizer import end_ids, tokenizer_of
from rlx.processes.rundir import check_run_dir
from rlx.rewards.base import check_prompt
from rlx.rewards.registry import label_use, make_verifier, user_functions

# A look at the first rows decodes so many images, and reads the heads of the others.
NUM_DECODED = 64


def preflight(config: Config) -> Config:
    """The configuration to run, with what it leaves open filled in (the steps of ``finetune.epochs``, the day of templates), and
    for an evaluation alone the folder ``eval`` of the run's, so that the run itself may be there and go on.

    Raises ConfigError with everything found wrong that the configuration alone does not show. Warnings, and what is different
    in a run that goes on, are told on standard error.
    """
    check_run_dir(config.run, evaluates=config.evaluation.only)  # before rows are read, which may take minutes
    folders = written_folders(config)
    check_places(config.run.dir, folders)
    config = replace(config, data=with_template_date(config.data, config.run))
    found = inspect(config)
    found.say_warnings()
    found.problems += environment_problems(config.tracker, config.model.layer_spec, EngineSettings.of(config))
    found.attempt(lambda: check_writable(folders))
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
        problems = [*steps_problem(resumption), *other_content(resumption)]
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
    return [*(steps_problem(found) if has_steps else []), *other_content(found, num_rows)]


@dataclass(slots=True, kw_only=True)
class Findings:
    """``problems`` forbid to start, ``warnings`` are for the user to see. ``num_examples`` is how many rows of data.train can be
    learnt from, when fine-tuning."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_examples: int = 0

    def attempt[T](self, check: Callable[[], T], key: str = "") -> T | None:
        """What ``check`` gives; a ValueError is a problem, of the key that is named."""
        try:
            return check()
        except ValueError as error:
            told = f"{key}: {error}" if key else str(error)
            self.problems += [] if told in self.problems else [told]
            return None

    def can_import(self, functions: Iterable[tuple[str, str]]) -> bool:
        """Whether importing the files of these (key, name) leaves this process alive and its own master."""
        problems = list(trial_problems(functions))
        self.problems += problems
        return not problems

    def say_warnings(self) -> None:
        for warning in self.warnings:
            print(f"rlx: warning: {warning}", file=sys.stderr, flush=True)


def inspect(config: Config, num_rows: int | None = None) -> Findings:
    """Look at everything that the run will read, of data files at the first ``num_rows`` rows (None: all). Starts nothing."""
    found, arch, engines = Findings(), read_architecture(config.model.path), EngineSettings.of(config)
    look = Look(num_rows=num_rows, check_ids=arch.check_ids)
    found.warnings += unused_keys(config, arch)
    if not config.evaluation.only and config.finetune.epochs is None:
        found.warnings += schedule_warnings(config)
    found.problems += model_problems(loaded_models(config), engines)
    found.warnings += weight_warnings(config.model.path, arch)
    tokenizer = found.attempt(lambda: tokenizer_of(config.model, config.data))
    if tokenizer is not None:
        found.problems += vocabulary_problems(tokenizer, arch)
        found.warnings += vocabulary_warnings(tokenizer, arch)
        num_decoded = None if num_rows is None else NUM_DECODED
        images = found.attempt(lambda: image_reader(config.model.path, config.data, tokenizer, None, num_decoded))
    # Without knowing how a model that sees reads images, nothing true can be said of the rows.
    can_read = tokenizer is not None and (arch.vision is None or images is not None)
    found.attempt(lambda: end_ids(config.model.path))
    if config.is_finetuning:
        if tokenizer is not None and can_read:
            reader = ExampleReader(data=config.data, finetune=config.finetune, tokenizer=tokenizer, images=images)
            if not config.evaluation.only:
                found.num_examples = found.attempt(lambda: check_examples(config.examples_path, reader, look), "data.train") or 0
            held_out = config.evaluation.data
            if held_out is not None:
                found.attempt(lambda: check_examples(held_out, reader, look), "evaluation.data")
        return found
    algorithm = config.algorithm
    names = {"algorithm.loss": algorithm.loss, "algorithm.advantages": algorithm.advantages}
    named = {} if config.evaluation.only else {key: name for key, name in names.items() if name is not None}
    if named and found.can_import(named.items()):
        found.attempt(lambda: import_module("rlx.algos.registry").try_algorithm(algorithm))
    verifier, of_user = None, found.attempt(lambda: list(user_functions(config.reward)))
    if of_user is not None and found.can_import(("reward.name", name) for name in of_user):
        verifier = found.attempt(lambda: make_verifier(config.reward))
    if tokenizer is not None and can_read:
        # Millions of prompts that no evaluation asks need not be read.
        data = replace(config.data, train=None, sources={}) if config.evaluation.only else config.data
        files = PromptFiles(data=data, evaluation=config.evaluation, tokenizer=tokenizer, seed=config.run.seed, images=images)
        if verifier is not None:
            look = replace(look, check_prompt=partial(check_prompt, verifier))
        found.attempt(lambda: found.problems.extend(files.problems(partial(label_use, config.reward), look)))
    found.problems += engine_problems(engines, config.data.max_prompt_tokens, num_rows)
    return found
