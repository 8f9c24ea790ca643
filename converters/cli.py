"""Arguments and exit status of ``python -m converters``, but for the conversions themselves.

0 done; 2 bad usage or input, found before anything was written; 1 anything else: differences, a full disk, an interruption.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from converters.plan import DTYPES, Layout


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m converters", description="Convert checkpoints between Hugging Face and Megatron, on a CPU."
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_to_megatron(commands.add_parser("hf-to-megatron", help="Hugging Face folder or hub id to Megatron (torch_dist)"))
    _add_to_hf(commands.add_parser("megatron-to-hf", help="Megatron checkpoint to Hugging Face folder"))
    return top


def _add_to_megatron(command: argparse.ArgumentParser) -> None:
    command.add_argument("--hf", required=True, metavar="DIR_OR_HUB_ID", help="folder, or owner/name to download from the hub")
    _add_common(command)
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        command.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"cut for this {meaning}-parallel size")
    command.add_argument("--etp", type=int, metavar="N", help="tensor-parallel size of experts (default: --tp)")
    command.add_argument("--dtype", choices=sorted(DTYPES), help="store in this type (default: each tensor's own)")
    command.add_argument("--verify", action="store_true", help="re-read and compare every bit; print a manifest")
    command.add_argument("--dry-run", action="store_true", help="print shards, bytes a rank and seconds; needs only config.json")


def _add_to_hf(command: argparse.ArgumentParser) -> None:
    command.add_argument("--megatron", required=True, type=Path, metavar="DIR", help="Megatron checkpoint (torch_dist)")
    _add_common(command)
    command.add_argument("--verify-against", type=Path, metavar="HF_DIR", help="re-read and compare with this folder")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty folder")
    command.add_argument("--config", metavar="FILE", help="config.json to use where the folder has none")
    command.add_argument("--tokenizer", metavar="DIR", help="folder with the tokenizer, where the model's has none; or: none")
    command.add_argument("--workers", type=int, default=min(4, len(os.sched_getaffinity(0))), metavar="N", help="threads")
    command.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in DIR.partial")


def layout_of(args: argparse.Namespace) -> Layout:
    """The target layout asked for."""
    return Layout(tp=args.tp, pp=args.pp, ep=args.ep, etp=args.tp if args.etp is None else args.etp)
