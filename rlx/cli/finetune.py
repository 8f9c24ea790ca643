"""``rlx sft``, ``rlx dpo``, ``rlx rm``: learn from given answers, from preferences, or a reward model from preferences."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from rlx.cli.train import add_arguments as add_arguments
from rlx.cli.train import start
from rlx.config.finetune import COMMAND_OBJECTIVES
from rlx.config.load import read_tree


def main(args: argparse.Namespace) -> int:
    """Exit status as ``rlx train``. Where the configuration names no objective, it is the command's own."""
    section = read_tree(args.config, args.overrides).get("finetune")
    named = section.get("objective", "none") if isinstance(section, Mapping) else "none"
    default = [f"finetune.objective={COMMAND_OBJECTIVES[args.command][0]}"] if named == "none" else []
    return start(args.config, [*args.overrides, *default], args.command)
