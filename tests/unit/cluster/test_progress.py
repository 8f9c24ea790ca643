"""Following the files of a run."""

import io
import json
from pathlib import Path

import pytest

from rlx.cluster.progress import Progress, Tail, evaluation_table, time_left


def test_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    tail = Tail(path, skip_old=True)
    assert tail.lines() == []
    with path.open("a", buffering=1) as file:
        seen = []
        for piece in ("on", "e\ntw", "o\n", "", "three\nfour"):
            file.write(piece)
            file.flush()
            seen.append(tail.lines())
    assert seen == [[], ["one"], ["two"], [], ["three"]]


def test_tail_skips_old_rows_and_follows_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("1\n2\n3\n4\n")
    tail = Tail(path, skip_old=True)
    assert tail.lines() == []
    path.write_text("1\n2\n")  # a resumed run drops what came after its checkpoint
    assert tail.lines() == []
    with path.open("a") as file:
        file.write("3'\n")
    assert tail.lines() == ["3'"]


def test_steps_phases_and_summary(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    out = io.StringIO()
    progress = Progress(tmp_path, total_steps=7, out=out)
    (tmp_path / "logs" / "trainer-0.log").write_text(
        "2026-01-01T00:00:00.000 trainer-0 PHASE step=-1 load model\nloss of phase\n"
        "2026-01-01T00:00:01.000 trainer-0 PHASE step=-1 load model\n"
        "2026-01-01T00:00:01.000 trainer-0 PHASE step=1 update policy\n"
    )
    (tmp_path / "logs" / "driver-0.log").write_text(
        "2026-01-01T00:00:01.000 driver-0 PHASE step=1 roll out\n"
        "2026-01-01T00:00:02.000 driver-0 NOTICE warning: step 1: the verifier failed\n"
    )
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9]
    rows = [{"step": i, "reward/mean": r, "perf/step_s": 2.0, "perf/tokens_per_s": 10.5} for i, r in enumerate(rewards, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "rew')
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines.pop(1) == "rlx: warning: step 1: the verifier failed"
    assert lines[0] == "rlx: load model"
    assert lines[1] == "step 1/7  reward +0.1000  s/step 2.00  tokens/s 10  eta 12.0 s" and len(lines) == 8
    assert lines[7] == "step 7/7  reward +0.9000  s/step 2.00  tokens/s 10"
    summary = progress.summary()
    assert "7 steps" in summary and "147 tokens" in summary
    assert "+0.3000 over the first 5 steps, +0.5400 over the last 5" in summary
    assert "model:" not in summary
    (tmp_path / "hf").mkdir()
    assert f"model: {tmp_path / 'hf'}" in progress.summary()


def test_where_the_start_went_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rlx.cluster.progress.time.monotonic", lambda: now[0])
    (tmp_path / "logs").mkdir()
    out = io.StringIO()
    progress = Progress(tmp_path, total_steps=7, out=out)
    stamp = "2026-01-01T00:00:00.000"
    said = [
        ("trainer", 12.0, "-1 wait for engines"),
        ("trainer", 72.4, "-1 load policy"),
        ("trainer", 72.9, "-1 connect"),
        ("driver", 80.0, "-1 publish"),
        ("driver", 88.2, "1 roll out"),
        ("driver", 95.0, "1 score"),
    ]
    for who, when, phase in said:
        now[0] = when
        with (tmp_path / "logs" / f"{who}-0.log").open("a") as log:
            log.write(f"{stamp} {who}-0 PHASE step={phase}\n")
        progress.tick()
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 1, "perf/step_s": 2.0}\n{"step": 2, "perf/step_s": 2.0}\n')
    progress.close()
    told = [line for line in out.getvalue().splitlines() if "first step after" in line]
    assert told == ["rlx: first step after 88 s: begin 12 s, wait for engines 60 s, connect 7 s, publish 8 s"]


def test_fine_tuning_shows_its_own_measures(tmp_path: Path) -> None:
    out = io.StringIO()
    progress = Progress(tmp_path, total_steps=2, out=out)
    rows = [{"step": i, "loss/train": 1 / i, "rewards/accuracy": i / 2, "perf/step_s": 3.0} for i in (1, 2)]
    rows[1]["eval/loss"] = 0.25
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 1/2  loss 1.0000  accuracy 0.500  s/step 3.00  eta 3.0 s",
        "step 2/2  loss 0.5000  accuracy 1.000  held-out loss 0.2500  s/step 3.00",
    ]
    summary = progress.summary()
    assert "loss: +0.7500 over 2 steps" in summary and "accuracy: +0.7500" in summary and "reward" not in summary


def test_time_left_counts_whole_steps() -> None:
    """Forty steps of 2 s after ten slow ones; an evaluation of 5 s and a save of 1 s each tenth step."""
    rows = [{"step": step, "perf/step_s": 8.0 if step <= 10 else 2.0} for step in range(1, 51)]
    for row in rows[9::10]:
        row |= {"perf/evaluate_s": 5.0, "perf/save_s": 1.0}
    assert time_left(rows, 150) == pytest.approx(100 * (2.0 + 0.6))
    assert time_left(rows, 50) == time_left([], 50) == 0.0


def test_an_evaluation_is_shown_with_all_its_sets(tmp_path: Path) -> None:
    row = {
        "step": 0,
        "eval/reward_mean": 0.5,
        "eval/reward_form": 1.0,
        "eval/tokens_mean": 12.25,
        "eval/cut_off_share": 0.25,
        "eval/invalid": 3.0,
        "eval/prompts": 16.0,
        "eval/aime/reward_mean": 0.125,
        "eval/aime/pass@1": 0.1,
        "eval/aime/pass@32": 0.5,
        "eval/aime/prompts": 30.0,
        "perf/evaluate_s": 4.0,
    }
    table = evaluation_table(row)
    assert [line.split() for line in table] == [
        ["eval", "aime"],
        ["reward_mean", "0.5000", "0.1250"],
        ["reward_form", "1.0000", "-"],
        ["tokens_mean", "12.2500", "-"],
        ["cut_off_share", "0.2500", "-"],
        ["invalid", "3", "-"],
        ["prompts", "16", "30"],
        ["pass@1", "-", "0.1000"],
        ["pass@32", "-", "0.5000"],
    ]
    assert len({len(line) for line in table}) == 1
    out = io.StringIO()
    progress = Progress(tmp_path, total_steps=7, out=out)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    progress.close()
    assert out.getvalue().splitlines() == ["step 0/7  s/evaluation 4.00", *table]
    assert "rlx: done: evaluation in" in progress.summary()
    assert evaluation_table({"step": 1, "eval/loss": 0.5, "eval/accuracy": 1.0}) == []
