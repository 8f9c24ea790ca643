"""Reward models as Hugging Face folders: ``...ForSequenceClassification`` with one label, whose logit is the score.

Transformers has no such class for models that see: their folders hold the model without its output layer, and the score's head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.arch.architecture import Architecture, is_megatron_checkpoint
from rlx.arch.families.registry import weight_table
from rlx.arch.sizes import expected_shapes
from rlx.models.hf.auto_classes import classifier_class, needs_score_bias
from rlx.models.hf.companions import Companions
from rlx.models.hf.folder import HfFolder
from rlx.models.hf.io import stage_weights, write_hf
from rlx.models.hf.whole import SCORE, SCORE_BIAS, check_score
from rlx.models.layers import ValueHead
from rlx.parallel.context import ParallelContext


def score_weights(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The head's weight under its Hugging Face name, on the ranks of the last pipeline stage."""
    for chunk in chunks:
        head = getattr(chunk, "output_layer", None)
        if isinstance(head, ValueHead):
            yield SCORE, head.weight


def load_score(chunks: Sequence[nn.Module], arch: Architecture, folder: str | Path) -> None:
    """Start from the head of a reward model, where the folder holds one; a language model's leaves the start values."""
    if is_megatron_checkpoint(folder):
        return
    source = HfFolder(folder)
    for name, weight in score_weights(chunks):
        if name not in source.files:
            continue
        check_score(folder, arch)
        with torch.no_grad():
            weight.copy_(source.read(name, 0, 0, 1))


def export_classifier(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    *,
    companions: Companions,
    target: str | Path,
    context: ParallelContext,
) -> None:
    """As ``hf.io.export_hf``, with the score's head in place of the output layer. Collective over all ranks."""
    table = weight_table(arch)
    output = set(table["output_layer.weight"].hf_names) if "output_layer.weight" in table else set()
    heads = {SCORE, SCORE_BIAS} if needs_score_bias(arch.model_type) else {SCORE}

    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from stage_weights(chunks, arch, context)
        for name, weight in score_weights(chunks) if context.is_sender else ():
            yield name, weight.detach()
            if SCORE_BIAS in heads:
                yield SCORE_BIAS, weight.detach().new_zeros(1)

    write_hf(
        weights(),
        (expected_shapes(arch).keys() - output) | heads,
        companions=companions,
        target=target,
        context=context,
        finish=_describe,
    )


def _describe(folder: Path) -> None:
    """Make the copied config.json that of a classifier.

    Transformers finds a sequence's last token by its padding id. Where that id also ends answers it would look one token
    too far to the left; the id is then taken out, and transformers asks for batches of one rather than score wrongly.
    """
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    ends = config.get("eos_token_id")
    if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        config["pad_token_id"] = None
    # Transformers has no class for models that see, but a server must not take the folder for one that generates.
    config["architectures"] = [classifier_class(config["model_type"]) or f"{config['model_type']}ForSequenceClassification"]
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
