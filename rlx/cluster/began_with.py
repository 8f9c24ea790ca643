"""Whether the models, the tokenizer and the rows of a run that goes on are those that it began with, wherever they lie now."""

from __future__ import annotations

from collections.abc import Iterator

from rlx.cluster.resumption import Resumption
from rlx.config.resume import BY_CONTENT
from rlx.config.schema import Config
from rlx.data.examples import ExampleSource
from rlx.data.prompts import PromptSource
from rlx.data.tokenizer import GIVE_BACK, tokenizer_of
from rlx.models.hf.fingerprint import origin_of


def other_content(found: Resumption, config: Config) -> list[str]:
    """What the run cannot go on with, a line each."""
    return [*other_models(found, config)] or [*_other_rows(found, config)]


def other_models(found: Resumption, config: Config) -> Iterator[str]:
    """Of the models and the tokenizer."""
    was, changed = found.saved.origin, {change.key for change in found.changes}
    if not was:
        return
    now = origin_of(config)
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


def _other_rows(found: Resumption, config: Config) -> Iterator[str]:
    """Deal as the run will: what cannot be gone on with is found as it would be there."""
    tokenizer, state = tokenizer_of(config), found.saved.state
    try:
        if config.is_finetuning:
            ExampleSource(config.examples_path, config, tokenizer).load_state(state["examples"])
        else:
            PromptSource(config.data, tokenizer, config.run.seed).load_state(state["prompts"])
    except ValueError as error:
        keys = [str(change) for change in found.changes if change.effect == BY_CONTENT and not change.key.startswith("model.")]
        yield f"{error}{f' (changed: {", ".join(keys)})' if keys else ''}"
