"""``rlx eval``: measure a model on the evaluation sets of a configuration, and train nothing.

Of ``model.path``, or with run.resume=auto of the newest checkpoint in run.dir. RUN_DIR/eval holds the row of metrics.jsonl that
each evaluation appends, and the logs.
"""

from __future__ import annotations

import argparse

from rlx.cli.train import add_arguments as add_arguments
from rlx.cli.train import start


def main(args: argparse.Namespace) -> int:
    """Exit status as ``rlx train``."""
    return start(args.config, [*args.overrides, "evaluation.only=true"], "eval")
