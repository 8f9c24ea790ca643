"""The environment variables by which launchers tell a rank who it is (torchrun's names)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlx.rollout.keys import EngineKeys

# What Megatron says at every import, in every rank, about packages that are optional here.
QUIET = {
    "PYTHONWARNINGS": ",".join(
        f"ignore:{notice}"
        for notice in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated")
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """This process's place among the trainer ranks."""

    rank: int
    local_rank: int
    world_size: int


def rank_environment() -> RankEnvironment:
    """Read RANK, LOCAL_RANK and WORLD_SIZE. ValueError names the ones that are missing or no numbers."""
    found = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise ValueError(f"environment variable {name} must be a number, got {text!r}: start this through a launcher")
        found[name] = int(text)
    return RankEnvironment(rank=found["RANK"], local_rank=found["LOCAL_RANK"], world_size=found["WORLD_SIZE"])


def attached_keys() -> EngineKeys:
    """The keys of servers that others started: RLX_ENGINE_API_KEY and RLX_ENGINE_ADMIN_KEY, each optional. A key in a
    configuration file would be copied into every run folder."""
    return EngineKeys(api_key=os.environ.get("RLX_ENGINE_API_KEY"), admin_key=os.environ.get("RLX_ENGINE_ADMIN_KEY"))
