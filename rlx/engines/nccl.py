"""One NCCL on both sides: ranks that load different ones refuse each other when trainers and engines form a group."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from rlx.engines import installed

_LIMIT_S = 300.0


@cache
def installed_for(python: str) -> Mapping[str, str]:
    """What ``rlx.engines.installed`` finds where ``python`` runs. ValueError when that is no interpreter, or has no torch."""
    if os.path.abspath(python) == os.path.abspath(sys.executable):
        return installed.installed()
    command = [python, "-c", Path(installed.__file__).read_text()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, cwd="/", check=False)
        found: Mapping[str, str] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{python} cannot be asked what is installed there: {error}") from error
    if not found:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"{python} cannot be asked what is installed there: {last[0]}")
    return found


def difference(trainers: str, engines: str) -> tuple[str, str] | None:
    """What two interpreters load differently, and the package to change of one of them; None when they go together."""
    ours, theirs = installed_for(trainers), installed_for(engines)
    if "nccl" not in ours or "nccl" not in theirs or ours["nccl"] == theirs["nccl"]:
        return None
    older, python, newer = min((ours, trainers, theirs), (theirs, engines, ours), key=lambda side: numbers(side[0]["nccl"]))
    package = newer["package"] or older["package"] or "nvidia-nccl-cu13"
    return (
        f"trainers load NCCL {ours['nccl']} ({ours['file']}), engines {theirs['nccl']} ({theirs['file']})",
        "ranks of different ones refuse each other; an older torch runs on a newer one:"
        f" {python} -m pip install --no-deps {package}=={newer['nccl']}",
    )


def check_nccl(engines: str) -> None:
    """ValueError when this interpreter, the trainers', and that of the engines load NCCLs that cannot be in one group."""
    found = difference(sys.executable, engines)
    if found is not None:
        raise ValueError(f"rollout.python: {'; '.join(found)}; or publish without a group of both: sync.transport=disk")


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
