"""The parts of a configuration that readers of data take."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import Config
from rlx.data.examples import ExampleReader
from rlx.data.prompts import PromptFiles


def reader_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> ExampleReader:
    return ExampleReader(data=config.data, finetune=config.finetune, tokenizer=tokenizer)


def files_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptFiles:
    return PromptFiles(data=config.data, evaluation=config.evaluation, tokenizer=tokenizer, seed=config.run.seed)
