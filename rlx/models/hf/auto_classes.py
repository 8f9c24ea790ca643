"""What transformers and SGLang make of a model type. Light to import: launchers ask before anything starts."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

# SGLang's classifiers of these types add a bias to the score, random unless the folder holds one. Transformers' have none.
_BIASED_IN_SGLANG = frozenset({"qwen2", "qwen3"})


def classifier_class(model_type: str) -> str | None:
    """The class of transformers that a reward model of this type is loaded by; None where it has none."""
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    return None if name is None else str(name)


def needs_score_bias(model_type: str) -> bool:
    """Whether SGLang gives a reward model's own scores only if its folder says that the head's bias is 0."""
    return model_type in _BIASED_IN_SGLANG
