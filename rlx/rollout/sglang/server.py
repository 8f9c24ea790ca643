"""A stock SGLang server as a child process: its command line, environment and files. Nothing of SGLang is imported.

The keys go into a file of mode 0600 that ``--config`` names, since a command line is shown by ``ps`` to everybody.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlx.arch.architecture import has_tower
from rlx.config.parts import EngineSettings
from rlx.config.sharing import MEM_FRACTION_STATIC
from rlx.rollout.flags import flags
from rlx.rollout.keys import EngineKeys
from rlx.rollout.server_args import server_args
from rlx.rollout.sglang.shared_tensors import (
    RECEIVER,
    RECEIVER_MODULE,
    RECEIVER_TRANSPORTS,
)

# Up to which batch of decode steps SGLang captures graphs by itself, on a GPU of 80 GB.
_GRAPHS_UP_TO = 256
# SGLang 0.5.15 ends itself unless port + 10000 is a port as well, for a service that is off by default.
ROOM_ABOVE_PORT = 10000
# Inherited, they make other servers of the engines: one of gRPC, which refuses keys, and one that takes no weights; or they name
# ports that engines of one machine would share.
_FOREIGN = frozenset({"SGLANG_GRPC_PORT", "SGLANG_RUST_SERVER", "SGLANG_PORT", "SGLANG_TCP_STORE_PORT"})
# Only token ids travel, so the server needs no tokenizer; at level "info" it would log its arguments, keys included.
_DEFAULTS: Mapping[str, object] = {"skip_tokenizer_init": True, "log_level": "warning"}
_CPU_DEFAULTS: Mapping[str, object] = {
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    "mem_fraction_static": 0.3,
}
_DEEPGEMM = "SGLANG_ENABLE_JIT_DEEPGEMM"
# SGLang's CPU path imports this name from vllm and never calls it on CPUs without AMX.
_VLLM_STAND_IN = '''"""Stands in for vllm's kernels, which SGLang's CPU path imports and does not call."""


def rotary_embedding(*arguments: object, **named: object) -> None:
    raise NotImplementedError("vllm's kernels are not installed")
'''


# The package of SGLang's extension point that takes images beside token ids, and its modules.
IMAGES_PACKAGE = "rlx_images"
_IMAGE_MODULES = ("image_processor.py", "image_request.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A process's place in an engine of ``num_nodes`` processes, one a node, which meet at ``address`` (HOST:PORT, where
    rank 0 listens). Only rank 0 answers requests."""

    rank: int
    num_nodes: int
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangSite:
    """Where one server runs: its number, device, address, port and key file. ``releases``: it gives GPU memory back when
    asked. ``span`` None: the whole engine is this process. ``model_path`` None: the folder that the engines' settings name."""

    index: int
    device: str
    host: str
    port: int
    key_file: Path
    python: str
    releases: bool = False
    span: Span | None = None
    model_path: str | None = None


def sglang_command(engines: EngineSettings, site: SGLangSite) -> list[str]:
    """The command line. ``rollout.server_args`` win over the defaults; ValueError for those that rlx sets itself."""
    given, precision = server_args(engines.rollout), engines.precision
    fixed: dict[str, object] = {
        "model_path": site.model_path or engines.model_path,
        "host": site.host,
        "port": site.port,
        "tp_size": engines.rollout.tp,
        "dtype": precision.torch_name,
        "device": site.device,
        "config": site.key_file,
    }
    if site.span is not None:
        fixed |= {"nnodes": site.span.num_nodes, "node_rank": site.span.rank, "dist_init_addr": site.span.address}
    # Engines that shared a seed would give the same draws to the same prompt.
    defaults = {**_DEFAULTS, "random_seed": (engines.seed * 1009 + site.index) % 2**31}
    if precision.name != "fp32":
        defaults["enable_fp32_lm_head"] = precision.fp32_head
    if site.device == "cpu":
        defaults |= _CPU_DEFAULTS
    if has_tower(engines.model_path):
        # Without it SGLang asks for a GPU to resize on, CPU or not; nothing is left to resize.
        defaults["disable_fast_image_processor"] = True
    if engines.transport in RECEIVER_TRANSPORTS:
        loaders = given.pop("custom_weight_loader", None) or []
        defaults["custom_weight_loader"] = [*([loaders] if isinstance(loaders, str) else loaders), RECEIVER]
    if site.device == "cuda" and engines.requests_at_once <= _GRAPHS_UP_TO and not any(n.startswith("cuda_graph") for n in given):
        defaults["cuda_graph_max_bs_decode"] = engines.requests_at_once  # each size captured takes a moment of the start
    if engines.cluster.colocated and site.device == "cuda":
        defaults |= {"mem_fraction_static": MEM_FRACTION_STATIC, "enable_memory_saver": site.releases}
    return [site.python, "-m", "sglang.launch_server", *flags(fixed | defaults | given)]


def sglang_environment(
    base: Mapping[str, str], site: SGLangSite, *, tp: int, cores: Sequence[int], modules: Path, devices: Sequence[str]
) -> dict[str, str]:
    """``base`` with what a server needs: the folder ``modules`` on its path. On CPUs: cores split over those of the ``tp``
    ranks that are here, and no NCCL, which SGLang would otherwise open. On GPUs: ``devices`` are the ones it sees."""
    env = {name: value for name, value in base.items() if name not in _FOREIGN}
    env["PYTHONPATH"] = os.pathsep.join([str(modules), *filter(None, [env.get("PYTHONPATH")])])
    if site.span is not None:
        # Where this node's processes are reached; by itself SGLang asks for the route to the internet, which need not be there.
        env["SGLANG_HOST_IP"] = site.host
    if site.device != "cpu":
        if site.releases:
            folders = [env.get("LD_LIBRARY_PATH"), *cuda_runtime_folders(site.python)]
            env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        return env | {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["SGLANG_NCCL_SO_PATH"] = "/nonexistent"
    if tp > 1:
        here = tp if site.span is None else tp // site.span.num_nodes  # SGLang looks its share up by the rank among all
        shares = [cores[rank % here % len(cores) :: here] for rank in range(tp)]
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    return env


def image_environment(engines: EngineSettings) -> dict[str, str]:
    """What the environment of a server says of images; nothing where the model has no tower."""
    if not has_tower(engines.model_path):
        return {}
    found = {"SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": IMAGES_PACKAGE}
    # SGLang keeps what a tower made of an image, through updates and flushes; only the receiver clears that.
    keeps = engines.transport in RECEIVER_TRANSPORTS or not engines.tower_learns
    return found if keeps else found | {"SGLANG_VLM_CACHE_SIZE_MB": "0"}


def fp8_environment(engines: EngineSettings, base: Mapping[str, str]) -> dict[str, str]:
    """What the environment of a server says of FP8, beside ``base``; nothing where its weights are not."""
    if not engines.rollout.fp8 or _DEEPGEMM in base:
        return {}
    # It compiles its kernels at the first start, for minutes and with nvcc, and on Blackwell takes scales of another kind, to
    # which SGLang would convert the weights that it starts with, but not those that it is sent.
    return {_DEEPGEMM: "0"}


def cuda_runtime_folders(python: str) -> list[str]:
    """Where the environment of ``python`` keeps the CUDA runtime. torch_memory_saver is preloaded into the server, needs
    that library and says not where; the loader ends a process whose preloaded library lacks one."""
    prefix = Path(python).parent.parent
    found = [str(path.parent) for path in sorted(prefix.glob("lib/python3*/site-packages/nvidia/*/lib/libcudart.so.*"))]
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if not found and maps.exists() else ""
    found += [line.split()[-1].rpartition("/")[0] for line in loaded.splitlines() if "/libcudart.so." in line]
    return list(dict.fromkeys(found))


def write_modules(modules: Path, device: str) -> None:
    """What servers import beside their own environment: rlx's receiver and images, and on CPUs a package ``vllm``."""
    modules.mkdir(parents=True, exist_ok=True)
    receiver = modules / RECEIVER_MODULE
    receiver.mkdir(exist_ok=True)
    for source in sorted(Path(__file__).with_name("receiver").glob("*.py")):
        shutil.copyfile(source, receiver / source.name)
    images = _package(modules / IMAGES_PACKAGE)
    for name in _IMAGE_MODULES:
        shutil.copyfile(Path(__file__).with_name(name), images / name)
    if device == "cpu":
        (_package(modules / "vllm") / "_custom_ops.py").write_text(_VLLM_STAND_IN)


def _package(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("")
    return folder


def write_key_file(path: Path, keys: EngineKeys) -> None:
    """SGLang's arguments for its keys, in a file (YAML by name and content) that only this user can read."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump({"api-key": keys.api_key, "admin-api-key": keys.admin_key}, file)
