"""The launcher starts processes and watches them: it must not pay for what only its children use."""

from __future__ import annotations

import subprocess
import sys


def test_the_launcher_imports_no_megatron() -> None:
    code = (
        "import sys, rlx.cli.train, rlx.cluster.local, rlx.cluster.torchrun; print([n for n in sys.modules if n == 'megatron'])"
    )
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"
