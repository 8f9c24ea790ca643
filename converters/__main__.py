"""``python -m converters hf-to-megatron | megatron-to-hf``.

Exit status: 0 done; 2 bad usage or input, found before anything was written; 1 anything else: differences, a full disk, an
interruption.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from converters.estimate import estimate
from converters.plan import DTYPES, Layout
from converters.source import described_by, find_companions
from converters.to_hf import Options as ToHfOptions
from converters.to_hf import ToHuggingFace
from converters.to_megatron import Options as ToMegatronOptions
from converters.to_megatron import ToMegatron
from rlx.arch.architecture import parse_config_json
from rlx.config.hub.located import model_folder
from rlx.models.hf.whole import LOADABLE
from rlx.processes.device import take_device
from rlx.processes.environment import enter_utf8_mode


def main(argv: Sequence[str] | None = None) -> int:
    """Run one conversion and return the exit status."""
    if argv is None:
        enter_utf8_mode("converters")
    args = _parser().parse_args(argv)
    try:
        run = _prepare(args)
    except KeyboardInterrupt:
        print("converters: interrupted before anything was written", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"converters: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"converters: {error}", file=sys.stderr)
        return 1
    try:
        return run()
    except KeyboardInterrupt:
        print(f"converters: interrupted; --resume goes on from {args.out}.partial", file=sys.stderr)
    except OSError as error:
        print(f"converters: {error}; what is written so far is in {args.out}.partial, --resume goes on", file=sys.stderr)
    except ValueError as error:
        print(f"converters: {error}", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        print(f"converters: failed: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _megatron() -> ModuleType:
    """Megatron's part, on the CPU. It is to find the device settled, and who is refused before does not wait for it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    take_device("cpu", 0)
    torch.set_num_threads(1)  # the workers are the parallelism
    return import_module("converters.megatron_format")


def _prepare(args: argparse.Namespace) -> Callable[[], int]:
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if args.command == "megatron-to-hf":
        return _prepare_to_hf(args)
    if args.dry_run:
        return _prepare_estimate(args)
    source = model_folder("--hf", args.hf)
    companions = find_companions(source, args.config, args.tokenizer)
    options = ToMegatronOptions(
        layout=_layout(args),
        dtype=DTYPES[args.dtype] if args.dtype else None,
        num_workers=args.workers,
        verify=args.verify,
        resume=args.resume,
    )
    conversion = ToMegatron(source, companions, args.out, options, _megatron)
    return lambda: _finish(conversion, args.out, "every tensor equals the source" if args.verify else None)


def _prepare_to_hf(args: argparse.Namespace) -> Callable[[], int]:
    if not args.megatron.is_dir():
        raise ValueError(f"--megatron {args.megatron}: no such folder")
    companions = find_companions(args.megatron, args.config, args.tokenizer)
    options = ToHfOptions(against=args.verify_against, num_workers=args.workers, resume=args.resume)
    conversion = ToHuggingFace(args.megatron, companions, args.out, options, _megatron)
    proof = f"every tensor equals {args.verify_against}" if args.verify_against else None
    return lambda: _finish(conversion, args.out, proof)


def _prepare_estimate(args: argparse.Namespace) -> Callable[[], int]:
    file = Path(args.config) if args.config else model_folder("--hf", args.hf) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; name the model's configuration with --config FILE")
    arch = described_by(file)
    config = parse_config_json(file)
    own = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = DTYPES[args.dtype] if args.dtype else own if own in LOADABLE else "bfloat16"
    lines = list(estimate(arch, _layout(args), dtype, args.out))

    def show() -> int:
        print("\n".join(lines))
        return 0

    return show


def _finish(conversion: ToMegatron | ToHuggingFace, out: Path, proof: str | None) -> int:
    differences = conversion.run()
    for difference in differences:
        print(f"converters: MISMATCH {difference.name}: {difference.what}", file=sys.stderr)
    if differences:
        print(f"converters: {len(differences)} tensors differ; {out} was not made, see {out}.partial", file=sys.stderr)
        return 1
    print(f"{out}: whole{f', {proof}' if proof else ''}")
    return 0


def _parser() -> argparse.ArgumentParser:
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


def _layout(args: argparse.Namespace) -> Layout:
    """The target layout asked for."""
    return Layout(tp=args.tp, pp=args.pp, ep=args.ep, etp=args.tp if args.etp is None else args.etp)


if __name__ == "__main__":
    sys.exit(main())
