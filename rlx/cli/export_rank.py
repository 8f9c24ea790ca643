"""The process of ``rlx export`` that holds the model; started by it."""

from __future__ import annotations

import sys
from importlib import import_module

from rlx.processes.device import take_device


def main(run_dir: str, checkpoint: str, out: str) -> int:
    device = take_device("cpu", 0)
    # It imports Megatron, which is to find the device settled.
    import_module("rlx.cli.export_model").export(run_dir, checkpoint, out, device)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
