"""Whether the models, the tokenizer and the rows of a run that goes on are those that it began with, wherever they lie now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from transformers import PreTrainedTokenizerBase

from rlx.cluster.resumption import Resumption
from rlx.config.parts import loaded_models
from rlx.config.resume import BY_CONTENT
from rlx.config.schema import DataConfig
from rlx.config.sources import task_of
from rlx.data.examples import ExampleReader, ExampleSource
from rlx.data.images.pixels import image_folder
from rlx.data.images.reader import image_reader
from rlx.data.prompts import PromptSource
from rlx.data.rows import read_rows
from rlx.data.tokenizer import GIVE_BACK, check_template, template_digest, tokenizer_of
from rlx.models.hf.fingerprint import origin_of


def other_content(found: Resumption, num_rows: int | None = None) -> list[str]:
    """What the run cannot go on with, a line each. Rows are compared where no file has more than ``num_rows`` (None: any)."""
    tokenizer = tokenizer_of(found.config.model, found.config.data)
    return [*_other_models(found, tokenizer)] or [*_other_data(found, tokenizer, num_rows)]


def _other_models(found: Resumption, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Of the models and the tokenizer."""
    was, changed = found.saved.origin, {change.key for change in found.changes}
    if not was:
        return
    now = origin_of(loaded_models(found.config), tokenizer)
    if was.get("tokenizer") != now.pop("tokenizer"):
        key = "model.tokenizer_path" if "model.tokenizer_path" in changed else "model.path"
        yield f"{key}: the tokenizer (its vocabulary, or how it cuts text) is not the one that the run began with; {GIVE_BACK}"
    for key in [name for name in now if name in was]:
        parts = [part for part in ("config.json", "tensors", "weights") if was[key].get(part) != now[key].get(part)]
        if not parts or (key == "model.reference_path" and key in changed):
            continue  # another reference that was asked for is followed
        what = "the reference would be another" if key == "model.reference_path" else "the weights come from the checkpoint"
        yield (
            f"{key}: {now[key]['folder']} has other {' and '.join(parts)} than {was[key]['folder']} had when the run began;"
            f" {what}: {GIVE_BACK}"
        )


def _other_data(found: Resumption, tokenizer: PreTrainedTokenizerBase, num_rows: int | None) -> Iterator[str]:
    """Deal as the run will: what cannot be gone on with is found as it would be there."""
    config = found.config
    kind = "examples" if config.is_finetuning else "prompts"
    state = found.saved.state.get(kind)
    if not isinstance(state, Mapping):
        yield f"finetune.objective: {found.saved.folder} was saved by a run of another kind, it knows no {kind}; {GIVE_BACK}"
        return
    try:
        images = image_reader(config.model.path, config.data, tokenizer, image_folder(config.run.dir))
        if not _all_within(config.data, num_rows):
            check_template(state, template_digest(tokenizer))
        elif config.is_finetuning:
            reader = ExampleReader(data=config.data, finetune=config.finetune, tokenizer=tokenizer, images=images)
            ExampleSource(config.examples_path, reader, config.run.seed).load_state(state)
        else:
            PromptSource(config.data, tokenizer, config.run.seed, images).load_state(state)
    except ValueError as error:
        keys = [str(change) for change in found.changes if change.effect == BY_CONTENT and not change.key.startswith("model.")]
        yield f"{error}{f' (changed: {", ".join(keys)})' if keys else ''}"


def _all_within(data: DataConfig, num_rows: int | None) -> bool:
    """Whether no file to train on has more rows than that; a task makes as many as it is asked for."""
    if num_rows is None:
        return True
    paths = [source.path for source in data.by_name.values()]
    try:
        return all(task_of(path) is None and next(islice(read_rows(path), num_rows, None), None) is None for path in paths)
    except ValueError:
        return False  # told where rows are looked at
