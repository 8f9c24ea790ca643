"""The environment that a launcher gives its children, and the pipe by which they notice that it died."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import rlx
from rlx.config.schema import ClusterConfig
from rlx.processes.children import LAUNCH_ID
from rlx.processes.environment import QUIET, hidden_gpus
from rlx.processes.threads import thread_variables


def child_environment(cluster: ClusterConfig, launch_id: str, *, num_peers: int, all_here: bool) -> dict[str, str]:
    """This process's environment plus the mark of the launch, the thread counts of one of ``num_peers`` processes and where to
    import rlx from; on CPUs, without GPUs. ``all_here``: whom a child speaks to is on this machine."""
    env = QUIET | dict(os.environ) | hidden_gpus(cluster.device)
    env |= thread_variables(cluster.threads_per_rank, env, num_peers)
    env = child_variables(env)
    env[LAUNCH_ID] = launch_id
    # SGLang sets these for itself; a group whose two sides differ forms, and its first broadcast fails.
    env.setdefault("NCCL_CUMEM_ENABLE", "0")
    env.setdefault("NCCL_NVLS_ENABLE", "0")
    # Kernels that are compiled on first use are there for the next run; by itself torch keeps them in the machine's /tmp.
    kept = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlx"
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
    env.setdefault("TRITON_CACHE_DIR", str(kept / "triton"))
    if all_here:
        # Do not depend on the host name resolving, and listen to nobody outside.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def child_variables(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` and what every process of ours needs: where to import rlx from, and output that is not held back."""
    root = str(Path(rlx.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return {"TOKENIZERS_PARALLELISM": "false", **env, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@contextmanager
def inherited_pipe() -> Iterator[int]:
    """The reading end of a pipe whose only writing end lives and dies with this process."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)
