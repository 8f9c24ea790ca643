"""What transformers calls the classes of a model type. Light to import: launchers ask before anything starts."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def classifier_class(model_type: str) -> str | None:
    """The class of transformers that a reward model of this type is loaded by; None where it has none."""
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    return None if name is None else str(name)
