"""``rlx doctor [--json] [--engine-python PYTHON]``: what is installed here, what fits together, what is missing, what to do."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rlx.cluster.doctor import examine

_MARKS = {"ok": "  ok ", "note": " note", "bad": "  BAD"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="a JSON list of findings, for scripts")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are to be written")
    parser.add_argument(
        "--engine-python", help="the interpreter of SGLang's environment, as rollout.python names it (default: this)"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 nothing bad; 1 something will not work."""
    findings = examine(args.run_dir, args.engine_python)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            advice = f"  -> {finding.advice}" if finding.advice else ""
            print(f"{_MARKS[finding.status]}  {finding.subject:{width}}  {finding.found}{advice}")
    return int(any(finding.status == "bad" for finding in findings))
