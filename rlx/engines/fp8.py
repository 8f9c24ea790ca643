"""What engines of FP8 weights start from, and whether the GPUs here can serve them.

The folder holds zeros: its weights are replaced before the first request, by trainers who have them in bf16 and send them in the
same format. So nothing is converted and read before engines serve, and an engine refuses at its start what it would not take.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from rlx.arch.engine_format import QUANTIZATION, engine_format
from rlx.arch.families.registry import read_architecture
from rlx.config.parts import EngineSettings
from rlx.models.hf.blank import write_blank
from rlx.models.hf.companions import Companions

FOLDER = "fp8"
_CAPABILITY = (8, 9)
_ASK_S = 30.0


def write_fp8_folder(engines: EngineSettings, run_dir: Path) -> Path:
    """Write the model folder of the run's engines, and say where. May be written by several nodes, and again, at any time."""
    target = (run_dir / "engines" / FOLDER).resolve()
    target.mkdir(parents=True, exist_ok=True)
    wanted, dtype = engine_format(read_architecture(engines.model_path), fp8=True), engines.precision.torch_name
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}-", dir=target.parent) as beside:
        write_blank(Path(beside), wanted.expected, wanted.dtypes, dtype)
        replace(Companions.of(engines.model_path), quantization=QUANTIZATION).write(Path(beside), dtype)
        for file in Path(beside).iterdir():
            os.replace(file, target / file.name)
    return target


def check_fp8(device: str) -> None:
    """ValueError where engines compute on ``device`` (cuda or cpu), or on GPUs of this machine, that have no FP8."""
    if device != "cuda":
        raise ValueError("rollout.fp8: engines of FP8 weights need GPUs, this machine shows none; set it to false")
    for number, found in enumerate(_capabilities()):
        if found < _CAPABILITY:
            raise ValueError(
                f"rollout.fp8: GPU {number} has compute capability {'.'.join(map(str, found))}; FP8 needs"
                f" {'.'.join(map(str, _CAPABILITY))} (Ada, Hopper) or newer; set it to false"
            )


def _capabilities() -> list[tuple[int, ...]]:
    """Of the machine's GPUs, from the driver's own tool: torch would take memory of a GPU to say it. None where it is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
        return [tuple(map(int, line.strip().split("."))) for line in answer.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []  # what cannot be asked here, SGLang finds as it starts
