"""The command ``rlx``: find the subcommand, run it, turn its outcome into an exit status.

0 done; 2 bad usage or configuration, found before anything starts; 128 + N stopped by signal N; 1 anything else, the cause in
the last line.
Only the chosen command's module is imported, so that ``rlx check`` needs no torch. A command is a module with
``add_arguments(parser)`` and ``main(args) -> int``.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from rlx.config.load import ConfigError
from rlx.processes.environment import enter_utf8_mode


@dataclass(frozen=True, slots=True)
class Command:
    """Where a subcommand lives and what it does."""

    module: str
    help: str


COMMANDS = {
    "train": Command("rlx.cli.train", "train a model (the main job)"),
    "sft": Command("rlx.cli.finetune", "supervised fine-tuning on given answers"),
    "dpo": Command("rlx.cli.finetune", "direct preference optimisation (DPO, IPO) on pairs of answers"),
    "rm": Command("rlx.cli.finetune", "train a reward model on pairs of answers"),
    "eval": Command("rlx.cli.eval", "evaluate a model, or the newest checkpoint of a run; train nothing"),
    "check": Command("rlx.cli.check", "validate a configuration and print it resolved; start nothing"),
    "reward": Command("rlx.cli.reward", "rlx reward try CONFIG: what the reward says of given answers, without a model"),
    "score": Command("rlx.cli.score", "log-probs of given tokens under a model"),
    "export": Command("rlx.cli.export", "a checkpoint of a run as a Hugging Face folder, also while it runs"),
    "report": Command("rlx.cli.report", "an HTML page with plots of one run, or of several together"),
    "doctor": Command("rlx.cli.doctor", "what is installed here, what fits together, what is missing"),
    "launch": Command("rlx.cli.launch", "a job for a scheduler: rlx launch slurm CONFIG ..."),
    "serve": Command("rlx.cli.serve", "the embedded engine, speaking SGLang's HTTP protocol"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlx`` with ``argv`` (the process's own arguments by default) and return the exit status."""
    if argv is None:
        enter_utf8_mode("rlx.cli.main")
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[0] if arguments else ""
    try:
        module = import_module(COMMANDS[chosen].module) if chosen in COMMANDS else None
        args = _parsed(_parser(chosen, module), _on_paper_last(arguments))
        assert module is not None, "argparse ends on an unknown command"
        args.owns_process = argv is None
        status = int(module.main(args))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rlx {chosen}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `head` has; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        traceback.print_exc()
        print(f"rlx {chosen}: failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """What ``parse_args`` gives, with overrides also where options stand between them: argparse takes one row of them only."""
    args, left = parser.parse_known_args(arguments)
    if left and (not hasattr(args, "overrides") or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides = [*args.overrides, *left]
    return args


def _on_paper_last(arguments: Sequence[str]) -> list[str]:
    """With ``--on-paper`` at the end: before the configuration or an override, argparse would take that for its folder."""
    if "--on-paper" not in arguments:
        return list(arguments)
    at = arguments.index("--on-paper")
    before, after = arguments[:at], arguments[at + 1 :]
    has_folder = bool(after) and re.search(r"^-|=|\.ya?ml$", after[0]) is None
    return [*before, *after[has_folder:], "--on-paper", *after[:has_folder]]


def _parser(chosen: str, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlx", description="Reinforcement-learning post-training for language models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name == chosen and module is not None:
            module.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
