"""The models of a run: weights by their headers, and whether the tokenizer's ids have rows in the embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PreTrainedTokenizerBase

from rlx.arch.architecture import Architecture, is_megatron_checkpoint
from rlx.arch.families.registry import read_architecture
from rlx.config.parts import EngineSettings, LoadedModel
from rlx.models.hf.auto_classes import classifier_class
from rlx.models.hf.files import HEAD
from rlx.models.hf.whole import check_score, check_weights, tensors_left_out


def model_problems(models: Mapping[str, LoadedModel], engines: EngineSettings) -> Iterator[str]:
    """What is wrong with the weights of each model, and with those of the policy for its engines or its export."""
    policy = models["model.path"]
    for key, model in models.items():
        if model is not policy and model.folder == policy.folder:
            continue
        try:
            arch = read_architecture(model.folder)
            check_weights(model.folder, arch, without=HEAD if model.has_head else None)
            if policy.has_head:
                check_score(model.folder, arch)
        except ValueError as error:
            yield f"{key}: {error}"
    if policy.has_head:
        arch = read_architecture(policy.folder)
        if arch.vision is None and classifier_class(arch.model_type) is None:
            yield f"model.path: transformers has no sequence classification for {arch.model_type!r} to export to"
    loads = engines.rollout.server_args.get("load_format", engines.rollout.server_args.get("load-format"))
    is_sglang = engines.num_started and engines.rollout.engine == "sglang"
    if is_sglang and is_megatron_checkpoint(policy.folder) and loads != "dummy" and not engines.rollout.fp8:
        yield (
            f"model.path: SGLang cannot read the converted checkpoint {policy.folder}; name the Hugging Face folder, or set"
            " rollout.server_args.load_format=dummy, for its weights are replaced before the first request"
        )


def weight_warnings(folder: str, arch: Architecture) -> Iterator[str]:
    """Weights that config.json has no place for change nothing, here as in transformers: it may be another model's."""
    try:
        left = tensors_left_out(folder, arch)
    except ValueError:
        return  # told as a problem
    if left:
        yield (
            f"model.path: {folder} holds {len(left)} tensors of layers that its config.json has no place for, the"
            f" first is {left[0]}; they are left out"
        )


def vocabulary_problems(tokenizer: PreTrainedTokenizerBase, arch: Architecture) -> Iterator[str]:
    """What the run itself writes into sequences."""
    end = tokenizer.eos_token_id
    if end is not None and not 0 <= end < arch.vocab_size:
        yield (
            f"model.tokenizer_path: its end-of-sequence token {end} is outside the vocabulary of {arch.vocab_size} of model.path;"
            " the tokenizer must be the model's"
        )


def vocabulary_warnings(tokenizer: PreTrainedTokenizerBase, arch: Architecture) -> Iterator[str]:
    """Tokens without a row in the embedding are no fault until a row of data has one."""
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= arch.vocab_size)
    if beyond:
        yield (
            f"model.tokenizer_path: {len(beyond)} of its tokens, from {beyond[0][1]!r} ({beyond[0][0]}) on, are outside the"
            f" vocabulary of {arch.vocab_size} of model.path; rows that have one are refused"
        )
