"""Whether an engine serves a model of the trainer's shape, before anything is sent: SGLang takes much that does not fit,
and a token id beyond its vocabulary ends it."""

from __future__ import annotations

from rlx.arch.architecture import read_config_json
from rlx.arch.engine_format import EngineFormat
from rlx.arch.fields import ConfigJson
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.errors import SyncError

EMBEDDING = "model.embed_tokens.weight"


def check_model(control: EngineControl, wanted: EngineFormat) -> None:
    """Compare what the engine says of its model, and the config.json that it names if it can be read from here, with
    ``wanted``. SyncError names the engine and both sizes, or the format that it does not have."""
    shape = wanted.shapes.get(EMBEDDING)
    if shape is None:
        return
    info = control.model_info()
    config = _config_json(info.get("model_path"))
    if config and bool(config.get("quantization_config")) != bool(wanted.converted):
        has, is_set = ("no", "true") if wanted.converted else ("a", "false")
        raise SyncError(
            f"engine {control.url} serves {info.get('model_path')}, whose config.json has {has} quantization_config, but"
            f" rollout.fp8 is {is_set}: it holds weights in another format than it would be sent"
        )
    facts = {**config, **{key: info[key] for key in ("vocab_size",) if key in info}}
    for key, size in zip(("vocab_size", "hidden_size"), shape, strict=True):
        if key in facts and facts[key] != size:
            raise SyncError(
                f"engine {control.url} serves another model ({info.get('model_path')}): its {key} is {facts[key]},"
                f" the trainer's is {size}"
            )


def _config_json(folder: object) -> ConfigJson:
    try:
        config = read_config_json(str(folder))
        return {**config, **(config.get("text_config") or {})}
    except ValueError:
        return {}  # it is on another machine
