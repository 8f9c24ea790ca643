"""The options of ``rlx serve``, for its command line and for those who start one. Knows no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlx.config.options import positive
from rlx.types.precision import PRECISIONS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", default=0, type=int, help="0: taken from the system")
    parser.add_argument("--dtype", default="fp32", choices=tuple(PRECISIONS), help="type of weights and activations")
    parser.add_argument("--enable-fp32-lm-head", action="store_true", help="logits in fp32 whatever --dtype is")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda when visible")
    parser.add_argument("--threads", type=positive, help="CPU threads of the model; none: torch's choice")
    parser.add_argument("--seed", type=int, help="makes the draws of requests without a sampling_seed repeatable")
    parser.add_argument("--max-running", default=512, type=positive, help="sequences decoded together")
    parser.add_argument("--weight-timeout-s", default=300.0, type=float, help="limit of joining a group and of a broadcast")
    parser.add_argument("--await-weights", action="store_true", help="read none: a trainer sends them before the first request")
    parser.add_argument("--rank", default=0, type=int, help="this engine's number in the log")
    parser.add_argument("--config", type=Path, help="JSON file with api-key and admin-api-key, which requests then must show")
    parser.add_argument("--parent-pipe", type=int, metavar="FD", help="end when this inherited pipe reaches its end")
