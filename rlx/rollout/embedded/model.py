"""The model: loading it, and the forward passes an engine needs (whole prompts, one more token; scores of a reward model).

Knows nothing of requests, scheduling or HTTP. Shapes: B rows, S columns, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlx.arch.architecture import has_tower
from rlx.arch.families.registry import read_architecture
from rlx.arch.vision import Vision
from rlx.rollout.embedded.images import Shown, Sight
from rlx.rollout.embedded.keyvalues import KeyValues, attention_mask, new_cache
from rlx.types.precision import Precision
from rlx.types.weights import torch_dtype

# The architecture's name in config.json says what a folder holds; this is a reward model, or another classifier.
_CLASSIFIER = "ForSequenceClassification"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What answers about the model need, without the model. ``generates`` False: it gives scores, not tokens. ``vision`` None: it
    sees no images."""

    path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    context_length: int
    end_ids: frozenset[int]
    dtype: str
    device: str
    generates: bool = True
    vision: Vision | None = None

    def at(self, path: str) -> ModelInfo:
        """The same model, loaded from another folder."""
        return replace(self, path=path)


class LanguageModel:
    """A Hugging Face causal model, or sequence classifier, in evaluation mode on one device; ``without_weights``: random ones
    until others come."""

    def __init__(self, folder: Path, precision: Precision, device: str, *, without_weights: bool = False) -> None:
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        generates = not any(name.endswith(_CLASSIFIER) for name in config.architectures or ())
        if not generates and has_tower(folder):
            raise ValueError(f"{folder} holds a reward model that sees images, which transformers has no class for")
        vision = read_architecture(folder).vision if generates and has_tower(folder) else None
        auto: Any = AutoModelForSequenceClassification
        if generates:
            auto = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
        model: Any
        dtype = torch_dtype(precision.torch_name)
        if without_weights:
            model = auto.from_config(config, dtype=dtype)
        else:
            model = auto.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
        self._head: Any = model.get_output_embeddings() if generates else getattr(model, "score", None)
        if not generates and self._head is None:
            raise ValueError(f"{folder}: {type(model).__name__} has no layer `score`, which reward models end in")
        self.module: torch.nn.Module = model.to(device).eval().requires_grad_(False)
        self._sight = None if vision is None else Sight(model, vision)
        self.device = torch.device(device)
        self.tokenizer: PreTrainedTokenizerBase | None = _load_tokenizer(folder)
        text_config = config.get_text_config(decoder=True)
        self.info = ModelInfo(
            path=str(folder),
            model_type=str(config.model_type),
            architectures=tuple(config.architectures or (type(model).__name__,)),
            vocab_size=int(model.get_input_embeddings().weight.shape[0]),
            context_length=int(text_config.max_position_embeddings),
            end_ids=_end_ids(model, self.tokenizer),
            dtype=precision.name,
            device=str(self.device),
            generates=generates,
            vision=vision,
        )

    def keep_logits_in_fp32(self) -> None:
        """From now on the output layer gives fp32 logits of whatever type its weight has. TypeError where the model ends
        in something else than a linear layer without bias."""
        layer = self._head
        if type(layer) is not torch.nn.Linear or layer.bias is not None:
            raise TypeError(f"--enable-fp32-lm-head: the model ends in {type(layer).__name__}; wanted Linear without bias")

        def forward(hidden: Tensor) -> Tensor:
            if hidden.is_cuda and layer.weight.dtype != torch.float32:
                product = torch.mm(hidden.flatten(0, -2), layer.weight.t(), out_dtype=torch.float32)
                return product.unflatten(0, hidden.shape[:-1])
            return torch.nn.functional.linear(hidden.float(), layer.weight.float())

        layer.forward = forward

    def prefill(self, prompts: list[Shown], all_logits: bool) -> tuple[Tensor, KeyValues]:
        """Run whole prompts. Returns their key/values and logits: [B, S, V] left-padded, or [B, V] of the last token."""
        tokens, positions, lengths = _left_padded([prompt.tokens for prompt in prompts])
        mask = attention_mask(lengths, tokens.shape[1], self.device)
        given: dict[str, Tensor] = {"input_ids": torch.from_numpy(tokens).to(self.device)}
        if self._sight is not None:
            positions = self._sight.positions(prompts, tokens.shape[1])
            given = {"inputs_embeds": self._sight.embeddings(given["input_ids"], prompts)}
        last = positions[..., -1] if positions.ndim == 2 else positions[..., -1].max(axis=0)
        key_values = KeyValues(new_cache(), lengths, shifts=last + 1 - lengths)
        logits = self._forward(given, positions, mask, key_values, all_logits)
        return (logits if all_logits else logits[:, -1]), key_values

    def scores(self, rows: list[list[int]]) -> list[list[float]]:
        """The scores (one a label) that a reward model gives each of these token sequences, read at its last token."""
        tokens, positions, lengths = _left_padded(rows)
        hidden = self.module.base_model(  # type: ignore[operator]
            input_ids=torch.from_numpy(tokens).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=attention_mask(lengths, tokens.shape[1], self.device),
            use_cache=False,
        ).last_hidden_state[:, -1]
        # In fp32, as the trainer has it.
        found: list[list[float]] = torch.nn.functional.linear(hidden.float(), self._head.weight.float()).tolist()
        return found

    def decode(self, tokens: npt.NDArray[np.int64], key_values: KeyValues) -> Tensor:
        """Append one token [B] to every row; returns the logits [B, V] after it."""
        positions = (key_values.lengths + key_values.shifts)[:, None]
        lengths = key_values.lengths + 1
        mask = attention_mask(lengths, key_values.width + 1, self.device)
        given = {"input_ids": torch.from_numpy(tokens[:, None]).to(self.device)}
        logits = self._forward(given, positions, mask, key_values, False)
        key_values.lengths = lengths
        return logits[:, -1]

    def _forward(
        self,
        given: Mapping[str, Tensor],
        positions: npt.NDArray[np.int64],
        mask: Tensor | None,
        key_values: KeyValues,
        all_logits: bool,
    ) -> Tensor:
        output = self.module(
            **given,
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=mask,
            past_key_values=key_values.cache,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        logits: Tensor = output.logits
        return logits

    def offload(self) -> None:
        """Give the weights' GPU memory back, keeping them in host memory; nothing on a CPU."""
        if self.device.type == "cuda":
            self.module.to("cpu")
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Undo ``offload``."""
        self.module.to(self.device)


def _left_padded(
    rows: list[list[int]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens and positions [B, S] of rows that all end in the last column, and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(lengths.max())
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        tokens[number, width - len(row) :] = row
    return tokens, np.maximum(np.arange(width) - (width - lengths[:, None]), 0), lengths


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every token that ends an answer: by config.json, generation_config.json and the tokenizer."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)  # a reward model has none
    for value in (
        model.config.get_text_config(decoder=True).eos_token_id,
        generation.eos_token_id if generation is not None else None,
        tokenizer.eos_token_id if tokenizer is not None else None,
    ):
        if value is not None:
            found.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(int(token) for token in found)
