"""What a launcher looks at before it starts anything: prompts or examples, tokenizer, verifier, the folder of weight syncs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryFile

from rlx.arch.families.registry import read_architecture
from rlx.cluster.began_with import other_content
from rlx.cluster.resumption import find_resumption, with_template_date
from rlx.config.load import ConfigError
from rlx.config.schema import Config
from rlx.data.examples import ExampleSource, check_examples
from rlx.data.prompts import check_prompts
from rlx.data.tokenizer import tokenizer_of
from rlx.models.hf.auto_classes import classifier_class
from rlx.models.hf.files import check_folder
from rlx.rewards.registry import label_use, make_verifier


def preflight(config: Config) -> Config:
    """The configuration to run, with what it leaves open filled in (the steps of ``finetune.epochs``, the day of templates), and
    for an evaluation alone the folder ``eval`` of the run's, so that the run itself may be there and go on.

    Raises ConfigError with everything found wrong that the configuration alone does not show. Of a run that goes on, it tells
    on standard error what is different.
    """
    problems: list[str] = []
    config = with_template_date(config)

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))

    attempt(lambda: _check_weights(config))
    if config.is_finetuning:
        attempt(lambda: _check_model(config))
        attempt(lambda: _check_examples(config))
    else:
        attempt(lambda: make_verifier(config.reward))
        attempt(lambda: problems.extend(_check_data(config)))
        attempt(lambda: _check_sync_folder(config))
    if problems:
        raise ConfigError(problems)
    if config.evaluation.only:
        return replace(config, run=replace(config.run, dir=str(Path(config.run.dir) / "eval")))
    if config.is_finetuning and config.finetune.epochs is not None:
        config = _in_steps(config, config.finetune.epochs)
    found = find_resumption(config)
    if found is not None:
        problems += other_content(found, config)
    if problems:
        raise ConfigError(problems)
    for note in found.notes if found else ():
        print(f"rlx: {note}", file=sys.stderr, flush=True)
    return config


def _check_weights(config: Config) -> None:
    for key in ("path", "reference_path", "critic_path"):
        folder = getattr(config.model, key)
        if folder is not None:
            try:
                check_folder(folder, is_tied=read_architecture(folder).tied_embeddings)
            except ValueError as error:
                raise ValueError(f"model.{key}: {error}") from error


def _check_data(config: Config) -> list[str]:
    # Millions of prompts that no evaluation asks need not be read.
    read = replace(config, data=replace(config.data, train=None, sources={})) if config.evaluation.only else config
    return check_prompts(read, tokenizer_of(config), lambda source: label_use(config.reward, source))


def _check_sync_folder(config: Config) -> None:
    if config.transport == "disk" and config.sync.dir is not None and not config.rollout.replay:
        try:
            Path(config.sync.dir).mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=config.sync.dir):
                pass
        except OSError as error:
            raise ValueError(f"sync.dir: cannot write to {config.sync.dir}: {error.strerror or error}") from error


def _check_model(config: Config) -> None:
    arch = read_architecture(config.model.path)
    if config.finetune.objective == "rm" and classifier_class(arch.model_type) is None:
        raise ValueError(f"model.path: transformers has no sequence classification for {arch.model_type!r} to export to")


def _check_examples(config: Config) -> None:
    tokenizer = tokenizer_of(config)
    for key, path in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        if path is not None and not (config.evaluation.only and key == "data.train"):
            try:
                check_examples(path, config, tokenizer)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error


def _in_steps(config: Config, epochs: float) -> Config:
    """With as many steps as deal every example ``epochs`` times."""
    num_examples = len(ExampleSource(config.examples_path, config, tokenizer_of(config)))
    steps = max(1, ceil(epochs * num_examples / config.finetune.examples_per_step))
    return replace(config, run=replace(config.run, steps=steps))
