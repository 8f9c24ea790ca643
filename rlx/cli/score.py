"""``rlx score``: log-probs of token sequences under a model, in any parallel layout, to compare with any reference."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from tempfile import TemporaryDirectory

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.arch.layout import layout_problems
from rlx.config.hub.located import model_folder
from rlx.config.load import ConfigError
from rlx.data.images.grid import place_images
from rlx.data.images.intake import ImageIntake, image_rules
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
        help='{"input_ids": [...]} a line; "images": [FILE, ...] too, relative ones beside IN.jsonl',
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
        num_ranks = dims_of(args, arch).world_size
    except (ValueError, ConnectionError) as error:
        raise ConfigError([str(error)]) from error
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in vars(args).items() if key in _OPTIONS and value is not None]
    hide_gpus(args.device)
    with TemporaryDirectory(prefix="rlx-score-") as images:
        try:
            read_asked(args.tokens, args.model, arch, Path(images))
            check_weights(args.model, arch)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        return run_local_ranks(this_module("rlx.cli.score_rank", f"--images={images}", *argv), num_ranks)


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
    """What an input file holds: the sequences and the images of each."""

    sequences: list[list[int]]
    images: list[tuple[ImageSpan, ...]]


def read_asked(file: Path, model: str, arch: Architecture, folder: Path) -> Asked:
    """The sequences of an input file; their images are taken in as ``model`` wants them, into ``folder`` (those that are there
    already are known). ValueError names the line that is not what it should be."""
    if not os.path.isfile(file):
        raise ValueError(f"--tokens: no such file: {file}")
    asked, intake = Asked(sequences=[], images=[]), None
    for where, row in read_jsonl(file):
        tokens, sources = row.get("input_ids"), row.get("images", [])
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise ValueError(f"{where}: input_ids must be a list of at least one whole number")
        if not isinstance(sources, list):
            raise ValueError(f"{where}: images must be a list of paths (or of images in base64)")
        with placed(where):
            arch.check_ids(tokens)
            if sources and arch.vision is None:
                raise ValueError(f"images for a model of text (model_type {arch.model_type!r})")
            spans: tuple[ImageSpan, ...] = ()
            if sources and arch.vision is not None:
                intake = intake or ImageIntake(image_rules(model, arch.vision, None, None), folder)
                taken = [intake.take(source, file.parent) for source in sources]
                spans = place_images(tokens, [(image.key, image.grid) for image in taken], arch.vision)
            asked.images.append(spans)
        asked.sequences.append(tokens)
    if not asked.sequences:
        raise ValueError(f"{file} holds no lines")
    return asked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx score", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
