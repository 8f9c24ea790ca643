"""What an environment has to run engines with, and the NCCL that its torch loads.

The engines' interpreter, whose environment need not have rlx, is given the text of this file: standard library and torch only.
"""

from __future__ import annotations

import ctypes
import json
from importlib import metadata
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")


def loaded_nccl() -> tuple[str, str] | None:
    """Version and file of the NCCL in this process, where torch was built with one (torch names the one it was built with)."""
    lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
    path = next((line.split()[-1] for line in lines if "/libnccl.so" in line), None)
    if path is None:
        return None
    number = ctypes.c_int()
    ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number))
    return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}", path


def installed() -> dict[str, str]:
    """Versions of torch, sglang and NCCL (with its file and the package it comes in), of those that are here."""
    packages = {str(found.metadata["Name"]): found.version for found in metadata.distributions()}
    here = {"torch": torch.__version__} | {name: version for name, version in packages.items() if name == "sglang"}
    nccl = loaded_nccl()
    if nccl is not None:
        package = next((name for name in packages if name.startswith("nvidia-nccl-")), "")
        here |= {"nccl": nccl[0], "file": nccl[1], "package": package}
    return here


if __name__ == "__main__":
    print(json.dumps(installed()))
