"""How each engine of a launch is started here, and on which cores or GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, RolloutConfig
from rlx.config.sharing import release_level
from rlx.engines.fleet import Fleet, Member
from rlx.engines.fp8 import check_fp8, write_fp8_folder
from rlx.engines.manager import EnginePlan
from rlx.engines.nccl import check_nccl
from rlx.processes.environment import attached_keys
from rlx.rollout.keys import EngineKeys
from rlx.rollout.server import engine_command
from rlx.rollout.sglang.server import (
    ROOM_ABOVE_PORT,
    SGLangSite,
    Span,
    fp8_environment,
    image_environment,
    sglang_command,
    sglang_environment,
    write_key_file,
    write_modules,
)
from rlx.sync.ports import free_port

# Over a group of trainers and engines, which is NCCL's on GPUs.
_GROUP_TRANSPORTS = ("stream", "broadcast")
# What SGLang calls the memory that it gives back, by rollout.release.
_TAGS: Mapping[str, tuple[str, ...]] = {"none": (), "kv_cache": ("kv_cache",), "all": ("kv_cache", "weights")}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSite:
    """Engine ``index`` of a launch: its run folder, the environment of all children, the pipe of the launcher's life, the
    address to listen on. ``gpus`` empty: the ones after the trainers'. ``span``: this is one of the engine's processes."""

    index: int
    run_dir: Path
    parent_pipe: int
    env: Mapping[str, str]
    keys: EngineKeys
    host: str = "127.0.0.1"
    gpus: tuple[str, ...] = ()
    span: Span | None = None


def plan_engine(engines: EngineSettings, site: EngineSite) -> EnginePlan:
    """What to run as this engine now. Writes the files that the engine reads; ValueError names a wrong setting."""
    return _plan_sglang(engines, site) if engines.rollout.engine == "sglang" else _plan_embedded(engines, site)


def check_placement(engines: EngineSettings) -> None:
    """ValueError when this machine lacks the GPUs that trainers and engines are to have, or they cannot share them."""
    if _device(engines.cluster) != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError("cluster.device: cuda, but no GPU is visible")
    if engines.num_trainer_ranks > count:
        raise ValueError(f"cluster.num_trainer_ranks: {engines.num_trainer_ranks} ranks need a GPU each, {count} are visible")
    if not engines.num_started:
        return
    if engines.cluster.colocated:
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            if "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", ""):
                raise ValueError(
                    f"cluster.colocated: {name} asks for expandable_segments, whose memory another process cannot open"
                    " (CUDA IPC) and torch_memory_saver refuses; unset it"
                )
    if engines.cluster.colocated or engines.rollout.engine == "sglang":
        _gpus_of(engines, engines.num_started - 1)


def _plan_embedded(engines: EngineSettings, site: EngineSite) -> EnginePlan:
    key_file = _key_file(site)
    argv = engine_command(engines, index=site.index, port=0, python=sys.executable, parent_pipe=site.parent_pipe)
    gpus: Sequence[str] = ()
    if _device(engines.cluster) == "cuda":
        gpus = site.gpus or (_gpus_of(engines, site.index) if engines.cluster.colocated else ())
    env = dict(site.env) | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    return EnginePlan(argv=[*argv, "--host", site.host, "--config", str(key_file)], env=env, host=site.host)


def _plan_sglang(engines: EngineSettings, site: EngineSite) -> EnginePlan:
    rollout, device = engines.rollout, _device(engines.cluster)
    python = rollout.python or sys.executable
    if rollout.fp8:
        check_fp8(device)
    if device == "cuda" and engines.transport in _GROUP_TRANSPORTS:
        check_nccl(python)
    port, modules = free_port(site.host, room_above=ROOM_ABOVE_PORT), site.run_dir / "engines" / "modules"
    write_modules(modules, device)
    server = SGLangSite(
        index=site.index,
        device=device,
        host=site.host,
        port=port,
        key_file=_key_file(site),
        python=python,
        releases=device == "cuda" and bool(released_tags(engines.cluster, rollout, device)),
        span=site.span,
        model_path=str(write_fp8_folder(engines, site.run_dir)) if rollout.fp8 else None,
    )
    env = sglang_environment(
        _without_own_code(site.env),
        server,
        tp=rollout.tp,
        cores=sorted(os.sched_getaffinity(0)),
        modules=modules,
        devices=site.gpus or (_gpus_of(engines, site.index) if device == "cuda" else ()),
    )
    env |= image_environment(engines) | fp8_environment(engines, env)
    return EnginePlan(argv=sglang_command(engines, server), env=env, port=port, host=site.host, span=site.span)


def _key_file(site: EngineSite) -> Path:
    folder = site.run_dir / "engines"
    folder.mkdir(exist_ok=True)
    # Of its own for each node: on a shared file system another one would take it away while it is read.
    path = folder / (f"keys-{site.index}.yaml" if site.span is None else f"keys-{site.index}-node{site.span.rank}.yaml")
    write_key_file(path, site.keys)
    return path


def _without_own_code(env: Mapping[str, str]) -> dict[str, str]:
    """The server's environment may be another one; rlx's folder on its path would bring our top-level names into it."""
    root = env["PYTHONPATH"].split(os.pathsep)[0]
    rest = [entry for entry in env["PYTHONPATH"].split(os.pathsep) if entry != root]
    return dict(env) | {"PYTHONPATH": os.pathsep.join(rest)}


def _device(cluster: ClusterConfig) -> str:
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _gpus_of(engines: EngineSettings, index: int) -> list[str]:
    """The GPUs of engine ``index``, ``rollout.tp`` an engine: those after the trainers', or from the trainers' first on."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    ranks, tp = engines.num_trainer_ranks, engines.rollout.tp
    taken = 0 if engines.cluster.colocated else ranks
    first = taken + index * tp
    chosen = names[first : first + tp]
    if len(chosen) < tp:
        needed = max(ranks, taken + engines.num_started * tp)
        raise ValueError(
            f"rollout.num_engines x rollout.tp: {ranks} trainer rank(s) and {engines.num_started} x"
            f" {tp} for engines need {needed} GPUs, {len(names)} are visible"
        )
    return chosen


def attached_fleet(rollout: RolloutConfig) -> Fleet:
    """Servers that others started; their keys come from this process's environment."""
    members = [Member(index=index, url=url, tp=rollout.tp) for index, url in enumerate(rollout.endpoints)]
    return Fleet(members=tuple(members), keys=attached_keys(), launched=False)


def released_tags(cluster: ClusterConfig, rollout: RolloutConfig, device: str) -> tuple[str, ...]:
    """What engines on ``device`` (cuda or cpu) give back while the trainers work, as SGLang calls it."""
    return _TAGS[release_level(cluster, rollout, device)]
