"""The models of a run: weights by their headers, and whether the tokenizer's ids have rows in the embedding."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from rlx.arch.architecture import Architecture, is_megatron_checkpoint
from rlx.arch.families.registry import read_architecture
from rlx.config.schema import Config
from rlx.models.hf.auto_classes import classifier_class
from rlx.models.hf.files import HEAD
from rlx.models.hf.whole import check_score, check_weights, tensors_left_out


def model_problems(config: Config) -> Iterator[str]:
    """What is wrong with the weights of each role."""
    is_reward_model = config.finetune.objective == "rm"
    model = config.model
    # A head of scores or values stands in the place of the output layer.
    roles = [("model.path", model.path, HEAD if is_reward_model else None)]
    if config.has_reference and model.reference_path is not None:
        roles.append(("model.reference_path", model.reference_path, None))
    if config.trains_critic and model.critic_path is not None:
        roles.append(("model.critic_path", model.critic_path, None if config.algorithm.name == "prime" else HEAD))
    for key, folder, without in roles:
        try:
            arch = read_architecture(folder)
            check_weights(folder, arch, without=without)
            if is_reward_model:
                check_score(folder, arch)
        except ValueError as error:
            yield f"{key}: {error}"
    if is_reward_model and classifier_class(read_architecture(model.path).model_type) is None:
        model_type = read_architecture(model.path).model_type
        yield f"model.path: transformers has no sequence classification for {model_type!r} to export to"
    loads = config.rollout.server_args.get("load_format", config.rollout.server_args.get("load-format"))
    if config.starts_engines and config.rollout.engine == "sglang" and is_megatron_checkpoint(model.path) and loads != "dummy":
        yield (
            f"model.path: SGLang cannot read the converted checkpoint {model.path}; name the Hugging Face folder, or set"
            " rollout.server_args.load_format=dummy, for its weights are replaced before the first request"
        )


def weight_warnings(config: Config, arch: Architecture) -> Iterator[str]:
    """Weights that config.json has no place for change nothing, here as in transformers: it may be another model's."""
    try:
        left = tensors_left_out(config.model.path, arch)
    except ValueError:
        return  # told as a problem
    if left:
        yield (
            f"model.path: {config.model.path} holds {len(left)} tensors of layers that its config.json has no place for, the"
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
