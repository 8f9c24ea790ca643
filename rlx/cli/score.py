"""``rlx score``: log-probs of token sequences under a model, in any parallel layout, to compare with any reference."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.arch.layout import layout_problems
from rlx.config.hub.located import model_folder
from rlx.config.load import ConfigError
from rlx.data.images.grid import place_images
from rlx.data.images.pixels import file_key, image_grid
from rlx.data.rows import placed, read_jsonl
from rlx.models.hf.whole import check_weights
from rlx.processes.environment import hide_gpus
from rlx.processes.local_ranks import run_local_ranks, this_module
from rlx.types.layout import ParallelDims
from rlx.types.precision import PRECISIONS
from rlx.types.rollout import ImageSpan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder, hub id, or converted checkpoint")
    parser.add_argument(
        "--tokens",
        required=True,
        type=Path,
        metavar="IN.jsonl",
        help='{"input_ids": [...]} a line; "images": [FILE.png, ...] too',
    )
    parser.add_argument("--out", required=True, type=Path, metavar="OUT.jsonl", help='{"logprobs": [...]} a line, length L-1')
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{meaning} parallel size")
    parser.add_argument("--etp", type=int, default=None, metavar="N", help="tensor parallel size inside experts; left out: --tp")
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="fp32", help="type of weights and activations")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda when visible")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="tokens of one packed forward pass")


def main(args: argparse.Namespace) -> int:
    try:
        check_out(args.out)
        args.model = str(model_folder("--model", args.model))
        arch = read_architecture(args.model)
        read_asked(args.tokens, arch)
        check_weights(args.model, arch)
        num_ranks = dims_of(args, arch).world_size
    except (ValueError, ConnectionError) as error:
        raise ConfigError([str(error)]) from error
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in vars(args).items() if key in _OPTIONS and value is not None]
    hide_gpus(args.device)
    return run_local_ranks(this_module("rlx.cli.score_rank", *argv), num_ranks)


_OPTIONS = ("model", "tokens", "out", "tp", "pp", "cp", "ep", "etp", "dtype", "device", "max_tokens")


def check_out(out: Path) -> None:
    """ValueError for a file that could not be written once the work is done."""
    if os.path.isdir(out) or not os.path.isdir(out.parent) or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out: {out} cannot be written: name a file in a folder that is there and yours")


def dims_of(args: argparse.Namespace, arch: Architecture) -> ParallelDims:
    """The layout asked for, on as many ranks as it takes; ValueError when the model cannot be cut so."""
    expert_tp = args.tp if args.etp is None else args.etp
    world_size = lcm(args.tp * args.cp, expert_tp * args.ep) * args.pp
    dims = ParallelDims(
        world_size=world_size,
        tp=args.tp,
        pp=args.pp,
        cp=args.cp,
        ep=args.ep,
        etp=args.etp,
        sequence_parallel=args.tp > 1,
    )
    for dimension, problem in layout_problems(arch, dims):
        raise ValueError(f"--{dimension}: {problem}")
    return dims


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an input file holds: the sequences, the images of each, and the images' files by key."""

    sequences: list[list[int]]
    images: list[tuple[ImageSpan, ...]]
    files: dict[str, Path]


def read_asked(file: Path, arch: Architecture) -> Asked:
    """The sequences of an input file. ValueError names the line that is not what it should be."""
    if not os.path.isfile(file):
        raise ValueError(f"--tokens: no such file: {file}")
    asked = Asked(sequences=[], images=[], files={})
    for where, row in read_jsonl(file):
        tokens, paths = row.get("input_ids"), row.get("images", [])
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise ValueError(f"{where}: input_ids must be a list of at least one whole number")
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{where}: images must be a list of paths of PNG files")
        with placed(where):
            arch.check_ids(tokens)
            asked.images.append(_images(paths, tokens, arch, asked.files))
        asked.sequences.append(tokens)
    if not asked.sequences:
        raise ValueError(f"{file} holds no lines")
    return asked


def _images(paths: list[str], tokens: list[int], arch: Architecture, files: dict[str, Path]) -> tuple[ImageSpan, ...]:
    """Where the images stand: at the first placeholders; their files are added to ``files``."""
    if not paths:
        return ()
    if arch.vision is None:
        raise ValueError(f"images for a model of text (model_type {arch.model_type!r})")
    found = []
    for path in map(Path, paths):
        key = file_key(path)
        files[key] = path
        found.append((key, image_grid(path, arch.vision)))
    return place_images(tokens, found, arch.vision)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx score", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
