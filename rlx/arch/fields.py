"""The fields of a ``config.json``: what each may hold, and what one that is left out stands for.

A family's table has a row for every field that it reads, with transformers' default (a test sweeps them against transformers'
own classes). Every other field in use is refused by name, since it may change the computation; ``null``, ``false`` and zero
are taken for "not in use".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

ConfigJson = Mapping[str, Any]
Fields = Mapping[str, "Field"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field: its default, what it may hold (``fits`` and, in words, ``kind``), whether null is a value of it, and the other
    name that transformers reads it under."""

    default: Any
    kind: str
    fits: Callable[[Any], bool]
    null: bool = False
    alias: str | None = None


def whole(default: int | None, *, minimum: int = 1, null: bool = False, alias: str | None = None) -> Field:
    """A whole number; a default of None also means that null may be written."""

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= minimum

    kind = f"a whole number of at least {minimum}"
    return Field(default=default, kind=kind, fits=fits, null=null or default is None, alias=alias)


def number(default: float | None, *, null: bool = False) -> Field:
    return Field(default=default, kind="a finite number", fits=is_number, null=null or default is None)


def positive(default: float | None, *, null: bool = False) -> Field:
    """A number that the computation divides by, or takes a power or the root of."""
    kind = "a finite number above 0"
    return Field(default=default, kind=kind, fits=lambda value: is_number(value) and value > 0, null=null or default is None)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flag(default: bool | None, *, null: bool = False) -> Field:
    return Field(default=default, kind="true or false", fits=_is_a(bool), null=null or default is None)


def text(default: str | None, *, null: bool = False) -> Field:
    return Field(default=default, kind="a text", fits=_is_a(str), null=null or default is None)


def listed(kind: type, default: list[Any] | None = None) -> Field:
    """A list of values of ``kind``; without a default, null may be written too."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is kind for item in value)

    words = f"a list, each item of type {kind.__name__}"
    return Field(default=default, kind=words, fits=fits, null=default is None)


def nested() -> Field:
    """An object, or null."""
    return Field(default=None, kind="an object", fits=_is_a(dict), null=True)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def words(text: str) -> frozenset[str]:
    """Field names from a line of them."""
    return frozenset(text.split())


# What every decoder of the Llama lineage reads, with the defaults of transformers' LlamaConfig.
_DECODER: Fields = {
    "model_type": text(""),
    "vocab_size": whole(32000),
    "hidden_size": whole(4096),
    "intermediate_size": whole(11008),
    "num_hidden_layers": whole(32),
    "num_attention_heads": whole(32),
    "num_key_value_heads": whole(None),
    "head_dim": whole(None),
    "hidden_act": text("silu"),
    "max_position_embeddings": whole(2048),
    "rms_norm_eps": positive(1e-6),
    "tie_word_embeddings": flag(False),
    "attention_dropout": number(0.0, null=True),
    "rope_theta": positive(10_000.0),
    "rope_scaling": nested(),
    "rope_parameters": nested(),
    "partial_rotary_factor": number(1.0, null=True),
}
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


# What a model's files may call the type of its weights: torch's floating types.
_DTYPES = words("float16 half bfloat16 float32 float float64 double auto")
# -1 means none, as null does: LLaMA's first configurations have it.
_TOKENS = {"bos_token_id": -1, "eos_token_id": 0, "pad_token_id": -1}


def check_described(config: ConfigJson, vocab_size: int) -> None:
    """ValueError for a field that changes no log-prob, but that whoever loads the model goes by: the type of its weights, and
    the tokens that begin, end and pad a text."""
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and not (isinstance(value, str) and value.removeprefix("torch.") in _DTYPES):
            raise ValueError(f"config.json has {name}={value!r}; expected one of {', '.join(sorted(_DTYPES))}")
    for name, lowest in _TOKENS.items():
        problem = tokens_problem(name, config.get(name), vocab_size, lowest)
        if problem is not None:
            raise ValueError(f"config.json has {problem}")


def tokens_problem(name: str, value: Any, vocab_size: int, lowest: int = 0) -> str | None:
    """What is wrong with a token id of a model's files, or a list of them; null is none."""
    for token in value if isinstance(value, list) else [] if value is None else [value]:
        if type(token) is not int:
            return f"{name}={value!r:.200}; expected a token id or a list of them"
        if not lowest <= token < vocab_size:
            return f"{name}={token}, which is outside its vocabulary of {vocab_size}"
    return None


def decoder(more: Fields, **defaults: Any) -> Fields:
    """The table of a family: the decoder's fields with these ``defaults`` where they differ from Llama's, and ``more``."""
    changed = {name: replace(_DECODER[name], default=value) for name, value in defaults.items()}
    return {**_DECODER, **changed, **more}


def complete(config: ConfigJson, fields: Fields, ignored: Iterable[str]) -> dict[str, Any]:
    """Every field of the table with its value. ValueError names fields in use that neither the table nor ``ignored`` has, and
    values of the wrong kind."""
    _refuse_unknown(config, fields, ignored)
    found = {}
    for name, field in fields.items():
        given = next((key for key in (name, field.alias) if key in config), None)
        value = field.default if given is None else config[given]
        if value is None and not field.null:
            raise ValueError(f"config.json has {given}: null; leave it out for {field.default!r}, or give {field.kind}")
        if value is not None and not field.fits(value):
            raise ValueError(f"config.json has {given}={value!r}; expected {field.kind}")
        found[name] = value
    return found


def _refuse_unknown(config: ConfigJson, fields: Fields, ignored: Iterable[str]) -> None:
    unused: tuple[object, ...] = (None, False)
    aliases = {field.alias for field in fields.values()}
    known = {*fields, *aliases, *HARMLESS, *ignored}
    unknown = sorted(
        name for name, value in config.items() if name not in known and not name.startswith("_") and value not in unused
    )
    if unknown:
        raise ValueError(
            f"config.json has {', '.join(unknown)}, which rlx does not know for model_type {config.get('model_type')!r}; set"
            " to null what does not change the computation"
        )


def require(config: ConfigJson, name: str) -> Any:
    """A field that must be there."""
    if config.get(name) is None:
        raise ValueError(f"config.json lacks {name!r}")
    return config[name]


def refuse(config: ConfigJson, name: str, *allowed: Any) -> None:
    """Refuse a field whose value changes the computation in a way that is not built; absent counts as None."""
    value = config.get(name)
    if value not in allowed:
        wanted = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"config.json has {name}={value!r}; supported: {wanted}")
