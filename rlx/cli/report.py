"""``rlx report RUN_DIR [RUN_DIR ...]``: an HTML page with plots of a run, or of several laid over each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlx.config.load import ConfigError
from rlx.obs.report import plot, read_run, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="run folders; several are laid over each other")
    parser.add_argument("--out", type=Path, help="where the page goes (default: report.html in the first run folder)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write one picture (.svg, .png, .pdf) instead of a page")
    parser.add_argument("--metrics", default="reward/mean", help="of that picture: metrics, comma-separated (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 written; 2 nothing to report on."""
    try:
        runs = [read_run(folder) for folder in args.run_dirs]
        if args.plot is not None:
            args.plot.parent.mkdir(parents=True, exist_ok=True)
            plot(runs, [name.strip() for name in args.metrics.split(",")]).savefig(args.plot)
            written = args.plot
        else:
            written = args.out or args.run_dirs[0] / "report.html"
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(render(runs), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error
    print(written)
    return 0
