"""``python -m converters hf-to-megatron | megatron-to-hf``. What takes long to import is imported where it is needed, and
torch and Megatron beside the work."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from converters.books import Books
from converters.cli import layout_of, parser
from converters.plan import DTYPES
from converters.source import described_by, find_companions
from rlx.arch.architecture import parse_config_json
from rlx.config.hub.located import model_folder
from rlx.config.utf8 import enter_utf8_mode
from rlx.models.hf.whole import LOADABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one conversion and return the exit status."""
    if argv is None:
        enter_utf8_mode("converters")
    args = parser().parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything imports torch: conversions are a CPU's work
    with ExitStack() as stack:
        return _main(args, stack)


def _main(args: argparse.Namespace, stack: ExitStack) -> int:
    try:
        run = _prepare(args, stack)
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


def _prepare(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if args.command == "megatron-to-hf":
        return _prepare_to_hf(args, stack)
    if args.dry_run:
        return _prepare_estimate(args)
    source = model_folder("--hf", args.hf)
    companions = find_companions(source, args.config, args.tokenizer)
    if args.dtype or args.verify:
        importlib.import_module("torch")  # here before the other process starts, so that it is imported once
    books = stack.enter_context(Books())
    to_megatron = importlib.import_module("converters.to_megatron")  # while the other process begins
    options = to_megatron.Options(
        layout=layout_of(args),
        dtype=DTYPES[args.dtype] if args.dtype else None,
        num_workers=args.workers,
        verify=args.verify,
        resume=args.resume,
    )
    conversion = to_megatron.ToMegatron(source, companions, args.out, options, books)
    return lambda: _finish(conversion, args.out, "every tensor equals the source" if args.verify else None)


def _prepare_to_hf(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    if not args.megatron.is_dir():
        raise ValueError(f"--megatron {args.megatron}: no such folder")
    companions = find_companions(args.megatron, args.config, args.tokenizer)
    books = stack.enter_context(Books())
    to_hf = importlib.import_module("converters.to_hf")  # while the other process begins
    options = to_hf.Options(against=args.verify_against, num_workers=args.workers, resume=args.resume)
    conversion = to_hf.ToHuggingFace(args.megatron, companions, args.out, options, books)
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
    lines = list(importlib.import_module("converters.estimate").estimate(arch, layout_of(args), dtype, args.out))

    def show() -> int:
        print("\n".join(lines))
        return 0

    return show


def _finish(conversion: Any, out: Path, proof: str | None) -> int:
    differences = conversion.run()
    for difference in differences:
        print(f"converters: MISMATCH {difference.name}: {difference.what}", file=sys.stderr)
    if differences:
        print(f"converters: {len(differences)} tensors differ; {out} was not made, see {out}.partial", file=sys.stderr)
        return 1
    print(f"{out}: whole{f', {proof}' if proof else ''}")
    return 0


def _end(status: int) -> NoReturn:
    """End without taking torch apart module by module, which takes a third of a second. Nothing is open here any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main())
