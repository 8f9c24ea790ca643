"""How many CPU threads a trainer rank or an engine has.

Trainers and engines take turns: while the ones work the others wait. So the ranks of a machine share all of its cores, and so do
its engines. How sums are split over threads decides their last bits: the number follows from the configuration, the machine and
who sits on it, whatever launcher started the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may run on; no more than its container has time for."""
    cores = len(os.sched_getaffinity(0))
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return cores
    return min(cores, max(1, math.ceil(share))) if share > 0 else cores


def thread_variables(setting: int | None, said: Mapping[str, str], num_peers: int) -> dict[str, str]:
    """The variables by which libraries know: ``setting`` (``cluster.threads_per_rank``), else what the environment ``said``
    already says, else a share of the cores among ``num_peers``, the processes of this kind on this machine."""
    if setting is not None:
        return dict.fromkeys(VARIABLES, str(setting))
    share = str(max(1, usable_cores() // max(1, num_peers)))
    general = said.get("OMP_NUM_THREADS") or share
    return {name: said.get(name) or general for name in VARIABLES}


def settle_threads(setting: int | None, num_peers: int) -> int | None:
    """The same for this process, before its libraries are imported. The number for those that are already; None where the
    environment's is no plain number, which is then the libraries' to understand."""
    os.environ.update(thread_variables(setting, os.environ, num_peers))
    first = os.environ["OMP_NUM_THREADS"].partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def forget_launchers_threads() -> None:
    """torchrun gives several ranks ``OMP_NUM_THREADS=1`` where nobody said anything: that is no wish of the user's."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    try:
        began_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return
    if not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in began_with):
        del os.environ["OMP_NUM_THREADS"]
