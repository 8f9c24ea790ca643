"""What is installed here, what fits together and what is missing: findings with advice, for people and for scripts.

Versions are compared with ``launch/constraints.txt``, the ones that the tests pass with. Packages are looked up, not
imported, so that a broken one cannot take the doctor with it; only torch is, for the GPUs.
"""

from __future__ import annotations

import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from rlx.config.packaged import packaged
from rlx.engines.nccl import difference, installed_for, numbers
from rlx.rollout.sglang import TESTED

GIB = 2**30
_REQUIRED = ("torch", "megatron-core", "transformers", "omegaconf", "safetensors", "numpy", "aiohttp", "tokenizers")
# What each is for; none of them is needed on a CPU machine.
_OPTIONAL = {
    "transformer-engine": "Megatron's fast layers on GPUs: pip install 'rlx[gpu]'",
    "ray": "jobs on a Ray cluster: pip install 'rlx[ray]'",
    "flash-attn": "packed sequences on GPUs without Transformer Engine",
}
_MIN_FILES = 4096
_MIN_SHM_BYTES, _MIN_DISK_BYTES = GIB, 10 * GIB
_MIN_PORTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``status`` is ok, note (fine, but know it), or bad (will not work); ``advice`` what to do, empty when ok."""

    subject: str
    status: str
    found: str
    advice: str = ""


def examine(run_dir: Path, engine_python: str | None = None) -> list[Finding]:
    """All findings on this machine, for runs that write below ``run_dir`` and have SGLang where ``engine_python`` is."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        lambda: _packages(tested_versions()),
        lambda: _engines(engine_python),
        _apex,
        _gpus,
        _network,
        lambda: _limits(run_dir),
    )
    return [finding for part in parts for finding in part()]


def tested_versions() -> dict[str, str]:
    """Package -> version of the constraints files, a GPU installation's where SGLang is here; empty without the files."""
    found = [packaged(f"launch/{name}.txt") for name in ("constraints", "constraints-gpu")]
    base, gpu = (parse_constraints(file.read_text()) if file else {} for file in found)
    return base | gpu if _version("sglang") else gpu | base


def parse_constraints(text: str) -> dict[str, str]:
    """``name==version`` lines; names as the package index spells them (lower case, dashes)."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def compare(name: str, found: str | None, tested: Mapping[str, str], *, optional: str | None = None) -> Finding:
    """One package's version against the tested one."""
    want = tested.get(name)
    if found is None:
        if optional is not None:
            return Finding(subject=name, status="note", found="not installed", advice=f"for {optional}")
        pin = f"{name}=={want}" if want else name
        return Finding(subject=name, status="bad", found="not installed", advice=f"pip install '{pin}'")
    public = found.partition("+")[0]
    if want is None or public == want:
        return Finding(subject=name, status="ok", found=found)
    advice = f"the tests pass with {want}; on trouble: pip install '{name}=={want}'"
    return Finding(subject=name, status="note", found=found, advice=advice)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] == (3, 12)
    advice = "" if good else "megatron-core needs 3.12: make an environment with python3.12"
    yield Finding(subject="python", status="ok" if good else "bad", found=version, advice=advice)


def _packages(tested: Mapping[str, str]) -> Iterator[Finding]:
    for name in _REQUIRED:
        yield compare(name, _version(name), tested)
    for name, use in _OPTIONAL.items():
        yield compare(name, _version(name), tested, optional=use)


def _engines(python: str | None) -> Iterator[Finding]:
    """SGLang, and whether trainers and engines can be in one group of NCCL's."""
    oldest, newest = TESTED
    tests, pin = f"the tests pass with {oldest} to {newest}", f"pip install 'sglang>={oldest},<={newest}'"
    try:
        here, there = installed_for(sys.executable), installed_for(python or sys.executable)
    except ValueError as error:
        yield Finding(subject="sglang", status="bad", found=str(error), advice=f"{tests}: {pin}")
        return
    version = there.get("sglang")
    if version is None:
        advice = f"for rollouts at speed (rollout.engine=sglang): pip install 'rlx[gpu]', or name its interpreter; {tests}"
        yield Finding(subject="sglang", status="bad" if python else "note", found="not installed", advice=advice)
    else:
        good = numbers(oldest) <= numbers(version) <= numbers(newest)
        yield Finding(
            subject="sglang", status="ok" if good else "note", found=version, advice="" if good else f"{tests}; on trouble: {pin}"
        )
    apart = difference(sys.executable, python or sys.executable)
    if apart is not None:
        yield Finding(subject="nccl", status="bad" if torch.cuda.is_available() else "note", found=apart[0], advice=apart[1])
    else:
        yield Finding(subject="nccl", status="ok", found=here.get("nccl", "none"))


def _apex() -> Iterator[Finding]:
    """NVIDIA's apex is built from source; the package of that name on the index is something else."""
    if _version("apex") is None:
        yield Finding(
            subject="apex", status="note", found="not installed", advice="for fused optimizers on GPUs: launch/install.sh"
        )
    elif find_spec("amp_C") is None:
        advice = "this is not NVIDIA's, or built without its CUDA extensions: pip uninstall apex, then launch/install.sh"
        yield Finding(subject="apex", status="bad", found=str(_version("apex")), advice=advice)
    else:
        yield Finding(subject="apex", status="ok", found=str(_version("apex")))


def _gpus() -> Iterator[Finding]:
    built = torch.version.cuda
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        advice = "only cluster.device=cpu works here"
        if driver:
            advice += f"; nvidia-smi is installed: compare its driver's CUDA with torch's ({built}), and CUDA_VISIBLE_DEVICES"
        yield Finding(subject="gpus", status="bad" if driver else "note", found="none visible", advice=advice)
        return
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    sizes = {torch.cuda.get_device_properties(number).total_memory // GIB for number in range(count)}
    found = f"{count} x {', '.join(names)}, {'/'.join(map(str, sorted(sizes)))} GiB"
    alike = len(names) == 1
    advice = "" if alike else "layouts assume equal GPUs: choose some with CUDA_VISIBLE_DEVICES"
    yield Finding(subject="gpus", status="ok" if alike else "note", found=found, advice=advice)
    yield Finding(subject="cuda", status="ok", found=str(built))
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [f"{a}-{b}" for a, b in pairs if a < b and not torch.cuda.can_device_access_peer(a, b)]
    if pairs:
        advice = "tensor parallelism across them is slow: set cluster.nvlink_gpus" if apart else ""
        text = f"none between {', '.join(apart[:8])}" if apart else "between all"
        yield Finding(subject="peer access", status="note" if apart else "ok", found=text, advice=advice)


def _network() -> Iterator[Finding]:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        advice = f"add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; other nodes cannot find {host}"
        yield Finding(subject="host name", status="note", found=f"{host} does not resolve", advice=advice)
    else:
        loop = address.startswith("127.")
        advice = "other nodes would be told a loopback address: fine on one node, else fix /etc/hosts" if loop else ""
        yield Finding(subject="host name", status="note" if loop else "ok", found=f"{host} is {address}", advice=advice)
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low, high = map(int, path.read_text().split()) if path.exists() else (0, 0)
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        few = 0 < high - low < _MIN_PORTS
        advice = "widen net.ipv4.ip_local_port_range" if few else ""
        yield Finding(subject="ports", status="note" if few else "ok", found=f"{low} to {high}", advice=advice)
    except OSError as error:
        yield Finding(subject="ports", status="bad", found=f"none to be had: {error}", advice="end what holds them")


def _limits(run_dir: Path) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < _MIN_FILES
    advice = f"ulimit -n {_MIN_FILES} (the hard limit is {hard}): every request and rank holds some" if few else ""
    yield Finding(subject="open files", status="note" if few else "ok", found=str(soft), advice=advice)
    yield space("shared memory", Path("/dev/shm"), _MIN_SHM_BYTES, "NCCL needs it; in a container: --shm-size=16g or --ipc=host")
    where = run_dir.resolve()
    while not where.exists():
        where = where.parent
    yield space(
        f"disk of {run_dir}", where, _MIN_DISK_BYTES, "a checkpoint holds 14 to 18 bytes a parameter: take another run.dir"
    )
    yield space("disk of /tmp", Path("/tmp"), GIB, "set TMPDIR to a folder with space")


def space(subject: str, folder: Path, minimum: int, advice: str) -> Finding:
    """Free bytes of a folder's file system against a minimum."""
    if not folder.is_dir():
        return Finding(subject=subject, status="bad", found=f"no {folder}", advice=advice)
    free = shutil.disk_usage(folder).free
    few = free < minimum
    return Finding(
        subject=subject, status="note" if few else "ok", found=f"{free / GIB:.1f} GiB free", advice=advice if few else ""
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
