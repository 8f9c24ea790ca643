"""Which fields of a ``config.json`` are known: every other one is refused by name, since it may change the computation.

A family lists what it reads beyond the common fields, and what it knows to be harmless. ``null``, ``false`` and
zero are taken for "not in use" in any field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def words(text: str) -> frozenset[str]:
    """Field names from a line of them."""
    return frozenset(text.split())


# Read by ``rlx.arch.architecture.common_fields``.
COMMON = words(
    """
    model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
    rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act attention_dropout
    rope_theta rope_scaling rope_parameters partial_rotary_factor
    """
)
# Say nothing about log-probs: where the model came from, how to start training one, how to generate, how to store.
HARMLESS = words(
    """
    architectures auto_map dtype torch_dtype transformers_version initializer_range use_cache
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    id2label label2id num_labels problem_type task_specific_params finetuning_task tokenizer_class prefix
    return_dict output_attentions output_hidden_states gradient_checkpointing
    max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty length_penalty num_beams
    num_beam_groups diversity_penalty num_return_sequences early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id
    forced_eos_token_id exponential_decay_length_penalty remove_invalid_values output_scores return_dict_in_generate
    cache_implementation
    unsloth_fixed unsloth_version
    """
)


def refuse_unknown_fields(config: Mapping[str, Any], known: Iterable[str]) -> None:
    """ValueError names the fields in use that neither the common list nor ``known`` has."""
    unused: tuple[object, ...] = (None, False)
    known = COMMON | HARMLESS | frozenset(known)
    unknown = sorted(
        name for name, value in config.items() if name not in known and not name.startswith("_") and value not in unused
    )
    if unknown:
        raise ValueError(
            f"config.json has {', '.join(unknown)}, which rlx does not know for model_type {config.get('model_type')!r}; set"
            " to null what does not change the computation"
        )
