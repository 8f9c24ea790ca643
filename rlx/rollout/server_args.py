"""``rollout.server_args``: further arguments of the engines by their own names, checked before any starts. Knows no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from rlx.config.schema import RolloutConfig
from rlx.rollout.embedded.options import add_options
from rlx.rollout.flags import flags

_OF_EMBEDDED = {"model", "host", "port", "dtype", "device", "rank", "parent_pipe", "config"}
_OF_SGLANG = {
    "model",
    "model_path",
    "host",
    "port",
    "dtype",
    "device",
    "tp",
    "tp_size",
    "tensor_parallel_size",
    "api_key",
    "admin_api_key",
    "config",
    "nnodes",
    "node_rank",
    "dist_init_addr",
    "nccl_init_addr",
}

_OF_FP8 = {"quantization", "load_format"}


def server_args(rollout: RolloutConfig) -> dict[str, Any]:
    """The arguments, names with underscores. ValueError for one that rlx sets itself or that the engine would not start with;
    what only SGLang knows of its own is left to it."""
    given = {name.replace("-", "_"): value for name, value in rollout.server_args.items()}
    is_embedded = rollout.engine == "embedded"
    own = _OF_EMBEDDED if is_embedded else _OF_SGLANG | (_OF_FP8 if rollout.fp8 else set())
    for name in given:
        if name in own:
            raise ValueError(f"rollout.server_args.{name} is set by rlx itself; remove it")
    if is_embedded:
        _parse(given)
    elif str(given.get("log_level", "warning")).lower() in ("debug", "info"):
        raise ValueError("rollout.server_args.log_level: below warning, SGLang writes its keys into its log; use warning")
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"rollout.server_args: the embedded engine does not start with these: {message}")


def _parse(given: Mapping[str, object]) -> None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_options(parser)
    parser.parse_args(["--model", ".", *flags(given)])
