"""A mixture with a curriculum and several evaluation sets, as a user runs it, interrupted and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlx.obs.metrics import read_metrics
from tests.e2e.job import demo_overrides, make_demo, numbers, rlx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_mixture_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    demo = make_demo(tmp_path / "demo")
    levelled = tmp_path / "levelled.jsonl"
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:50]]
    levelled.write_text("".join(json.dumps({**row, "digit": int(row["label"])}) + "\n" for row in rows))
    mixture = [
        "data.train=null",
        f"data.sources.plain={{path: {demo / 'train.jsonl'}, weight: 2}}",
        f"data.sources.levelled={{path: {levelled}, curriculum_key: digit}}",
        "data.sources.sums={path: 'reasoning-gym:chain_sum', args: {max_terms: 2, max_digits: 1, size: 40}}",
        "data.overlong=truncate",
        "data.max_prompt_tokens=16",
        "reward.name=by_source",
        "reward.args={sources: {sums: {name: reasoning-gym}}, otherwise: {name: numeric}}",
        f"evaluation.sets.greedy={{path: {demo / 'eval.jsonl'}, max_prompts: 10}}",
        f"evaluation.sets.drawn={{path: {demo / 'eval.jsonl'}, max_prompts: 5, samples_per_prompt: 4, temperature: 1.0}}",
        "evaluation.sets.sums={path: 'reasoning-gym:chain_sum', args: {max_terms: 2, max_digits: 1}, max_prompts: 5}",
        "evaluation.every=2",
        "run.export_hf=false",
    ]
    runs = {"whole": [4], "halves": [2, 4]}
    for name, ends in runs.items():
        for steps in ends:
            overrides = demo_overrides(demo, tmp_path / name, steps)
            rlx("train", *overrides, *mixture, "run.resume=auto", "checkpoint.every=2", timeout_s=400)
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")
    last = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1].metrics
    assert {"reward/mean/plain", "reward/mean/levelled", "reward/mean/sums"} <= last.keys()
    assert last["data/epoch/plain"] == 16 / 1000 and last["data/epoch/levelled"] == 8 / 50
    assert last["data/prompt_truncated"] == 40
    assert {"eval/greedy/reward_mean", "eval/drawn/mean@4", "eval/drawn/pass@4", "eval/sums/reward_mean"} <= last.keys()
    assert (last["eval/greedy/prompts"], last["eval/sums/prompts"]) == (10.0, 5.0)
