"""Multi-head latent attention (DeepSeek-AI 2024) as read from a ``config.json``. Knows no Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.arch.fields import is_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023) in DeepSeek's form: with ``mscale`` m and a = ``mscale_all_dim``, rotated parts are multiplied
    by g(m) / g(a) and scores by g(a)^2, where g(x) = 0.1 x log(factor) + 1."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes of latent attention: ranks of the compressed query (None: queries are not compressed) and key-value, and what
    each head has without a position, with a rotary one (in interleaved pairs), and as value."""

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    yarn: Yarn | None = None


_YARN_FIELDS = {
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim",
}  # fmt: skip


def read_yarn(parameters: Mapping[str, Any]) -> Yarn:
    """YaRN of rope parameters. ValueError names fields that are unknown, missing or not consistent."""
    unknown = sorted(name for name, value in parameters.items() if name not in _YARN_FIELDS and value is not None)
    if unknown:
        raise ValueError(f"config.json has {', '.join(unknown)} in its rope parameters, which rlx does not know for 'yarn'")
    missing = [name for name in ("factor", "original_max_position_embeddings") if parameters.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)} in its rope parameters")
    for name in _YARN_FIELDS - {"rope_type", "type"}:
        if parameters.get(name) is not None and not is_number(parameters[name]):
            raise ValueError(f"config.json has {name}={parameters[name]!r} in its rope parameters; expected a finite number")
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim) and (mscale or 1.0) != 1.0:
        raise ValueError("config.json has one of mscale and mscale_all_dim in its rope parameters; both or neither are supported")
    return Yarn(
        factor=float(parameters["factor"]),
        original_max_positions=int(parameters["original_max_position_embeddings"]),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        mscale=float(mscale or 1.0),
        mscale_all_dim=float(all_dim or 0.0),
    )
