"""The launcher starts processes and watches them: it must not pay for what only its children use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_launcher_imports_no_megatron() -> None:
    code = (
        "import sys, rlx.cli.train, rlx.cluster.local, rlx.cluster.torchrun; print([n for n in sys.modules if n == 'megatron'])"
    )
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"


def test_a_package_that_wants_a_gpu_driver_does_not_end_a_trainer_on_cpus(tmp_path: Path) -> None:
    """As SGLang's flash_mla beside Megatron: its library asks the loader for libcuda.so.1."""
    (tmp_path / "flash_mla").mkdir()
    (tmp_path / "flash_mla" / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    code = "from rlx.processes.device import take_device; take_device('cpu', 0)\n"
    code += "from megatron.core.transformer import attention; print(attention.HAVE_FMLA)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=env, timeout=120, check=False)
    assert found.stdout.split() == ["False"], found.stderr[-2000:]
