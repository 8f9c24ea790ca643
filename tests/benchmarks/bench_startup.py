"""From the command to the first rollout request, by launcher, next to the time that loading the models takes in the same
run. ``make bench-startup``; it fails when a launcher takes more than 30 s beside loading.

Times come from the ranks' logs; loading is the longest of the trainer ranks' load phases, engines load beside them.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.e2e.job import demo_overrides, make_demo, rlx
from tests.e2e.ray_job import RayRun
from tests.e2e.torchrun_job import Nodes

LIMIT_S = 30.0
SMALL = ["run.export_hf=false", "checkpoint.at_end=false"]
_PHASE = re.compile(r"^(\S+) trainer-\d+ PHASE step=(-?\d+) (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds from the command to the first rollout request, and of it those of loading the models."""

    total_s: float
    loading_s: float

    @property
    def over_s(self) -> float:
        return self.total_s - self.loading_s


def local(folder: Path, arguments: list[str]) -> None:
    rlx("train", *arguments, timeout_s=900)


def torchrun(folder: Path, arguments: list[str]) -> None:
    nodes = Nodes(folder, arguments, 2)
    assert nodes.finish(900) == [0, 0], nodes.out(0)[-3000:]


def on_ray(folder: Path, arguments: list[str]) -> None:
    run = RayRun(folder, folder / "run", arguments)
    assert run.finish(900) == 0, run.out[-3000:]


LAUNCHERS: dict[str, Callable[[Path, list[str]], None]] = {"local": local, "torchrun": torchrun, "ray": on_ray}


def measure(launcher: str, demo: Path) -> StartUp:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.time()
        LAUNCHERS[launcher](folder, [*demo_overrides(demo, folder / "run", 1), *SMALL])
        logs = [path.read_text() for path in sorted((folder / "run" / "logs").glob("trainer-*.log"))]
    phases = [[(_seconds(when), int(step), what) for when, step, what in _PHASE.findall(log)] for log in logs]
    first = next(when for when, step, what in phases[0] if step >= 0 and what == "rollout")
    return StartUp(first - began, max(_loading(found) for found in phases))


def _loading(phases: list[tuple[float, int, str]]) -> float:
    """From the first load phase to what follows the last."""
    loads = [number for number, (_, _, what) in enumerate(phases) if what.startswith("load ")]
    return phases[loads[-1] + 1][0] - phases[loads[0]][0]


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).replace(tzinfo=UTC).timestamp()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("launchers", nargs="*", help=f"of {', '.join(LAUNCHERS)}; default: all")
    chosen = parser.parse_args().launchers or list(LAUNCHERS)
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        demo = make_demo(Path(name))
        print(f"{'launcher':10} {'to first rollout':>17} {'loading models':>15} {'over':>7}")
        for launcher in chosen:
            found = measure(launcher, demo)
            worst = max(worst, found.over_s)
            print(f"{launcher:10} {found.total_s:15.1f} s {found.loading_s:13.1f} s {found.over_s:5.1f} s", flush=True)
    return int(worst > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
