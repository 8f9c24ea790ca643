"""Steps without signal in a whole job: it goes on after them, is resumed from them, and ends when there are too many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.job import demo_overrides, make_demo, numbers, rlx

pytestmark = pytest.mark.timeout(900)  # four runs of a quarter of a minute where nothing else runs

REWARD = """
def score(prompt, response, label, flat, **extra):
    return 0.0 if flat else float(sum(map(ord, response)) % 2)
"""


class Job:
    """Four prompts a step, in the order of their file: those of steps 2 and 3 get equal rewards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._demo = folder, make_demo(folder / "demo")
        (folder / "reward.py").write_text(REWARD)
        flat = [step in (2, 3) for step in range(1, 6) for _ in range(4)]
        rows = [json.dumps({"prompt": f"next {i} =", "label": "", "flat": is_flat}) for i, is_flat in enumerate(flat)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")

    def train(self, name: str, steps: int, *more: str, status: int = 0) -> str:
        """What a run says, recorded in NAME.jsonl."""
        options = [
            *demo_overrides(self._demo, self.folder / name, steps),
            f"data.train={self.folder / 'rows.jsonl'}",
            "data.shuffle=false",
            "data.prompts_per_step=4",
            "parallel.tp=1",
            f"reward.name={self.folder / 'reward.py'}:score",
            "algorithm.name=dapo",
            "algorithm.dynamic_max_factor=1",
            f"rollout.record={self.folder / name}.jsonl",
            "run.resume=auto",
            "run.export_hf=false",
            *more,
        ]
        done = rlx("train", *options, check=False)
        assert done.returncode == status, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def recorded(self, name: str) -> list[tuple[object, ...]]:
        """What was sampled, by which weights, in the order of the prompts."""
        rows = [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]
        timed = ("rollout_logprobs",)  # how requests fall into the engine's batches depends on timing
        return sorted((row["step"], row["prompt_id"], json.dumps(_without(row, timed))) for row in rows)


def _without(value: object, names: tuple[str, ...]) -> object:
    if isinstance(value, dict):
        return {key: _without(below, names) for key, below in value.items() if key not in names}
    return [_without(each, names) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def said(job: Job) -> str:
    """What a run of five steps in one go says."""
    return job.train("whole", 5, "checkpoint.at_end=false")


def test_steps_without_signal_are_shown_and_passed_over(job: Job, said: str) -> None:
    whole = numbers(job.folder / "whole")
    assert [row.get("batch/empty_steps") for row in whole] == [None, 1, 2, None, None]
    assert [row.get("sync/version") for row in whole] == [1, None, None, 4, 5]
    assert [row["dynamic/groups_without_signal"] for row in whole[1:3]] == [4, 4]
    assert "step 3: nothing to train on, 2 in a row (run.max_empty_steps=10): groups left out: without_signal 4" in said
    assert "step 3/5  empty 2  reward +0.0000" in said


def test_too_many_end_the_run_and_it_goes_on_from_one(job: Job, said: str) -> None:
    """The empty step before the checkpoint counts; afterwards the numbers are those of the run in one go."""
    job.train("parts", 2)
    told = job.train("parts", 5, "run.max_empty_steps=2", status=1)
    assert "nothing to train on in 2 steps in a row (run.max_empty_steps=2), the last of them step 3" in told
    assert "groups left out: without_signal 8" in told
    job.train("parts", 5)
    assert numbers(job.folder / "parts") == numbers(job.folder / "whole")
    assert job.recorded("parts") == job.recorded("whole")
