"""Whether an engine serves a model of the trainer's shape, before anything is sent: SGLang takes much that does not fit,
and a token id beyond its vocabulary ends it."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import read_config_json
from rlx.arch.fields import ConfigJson
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.errors import SyncError

EMBEDDING = "model.embed_tokens.weight"


def check_model(control: EngineControl, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what the engine says of its model, and the config.json that it names if it can be read from here, with
    ``expected``. SyncError names the engine and both sizes."""
    shape = expected.get(EMBEDDING)
    if shape is None:
        return
    info = control.model_info()
    facts = {**_config_json(info.get("model_path")), **{key: info[key] for key in ("vocab_size",) if key in info}}
    for key, wanted in zip(("vocab_size", "hidden_size"), shape, strict=True):
        if key in facts and facts[key] != wanted:
            raise SyncError(
                f"engine {control.url} serves another model ({info.get('model_path')}): its {key} is {facts[key]},"
                f" the trainer's is {wanted}"
            )


def _config_json(folder: object) -> ConfigJson:
    try:
        config = read_config_json(str(folder))
        return {**config, **(config.get("text_config") or {})}
    except ValueError:
        return {}  # it is on another machine
