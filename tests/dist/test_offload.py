"""Putting a trainer's memory away between updates changes nothing but where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.checkpoints import make_qwen2
from tests.dist.launch import run_ranks
from tests.dist.test_invariance import random_samples


@pytest.mark.slow
def test_updates_are_the_same_with_memory_put_away(tmp_path: Path) -> None:
    samples = random_samples(seed=5)
    for index, sample in enumerate(samples):
        sample["group_id"] = index // 3
    kinds = {
        "fp32, sharded": {"distributed": True, "model": {}},
        "bf16, sharded": {"distributed": True, "model": {"dtype": "bf16"}},
        "fp32": {"distributed": False, "model": {}},
        "bf16": {"distributed": False, "model": {"dtype": "bf16"}},
    }
    arguments = {
        "model": str(make_qwen2(tmp_path / "model", seed=1, num_layers=2)),
        "reference": str(make_qwen2(tmp_path / "reference", seed=2, num_layers=2)),
        "samples": samples,
        "max_tokens": 1000,
        "algorithm": {"name": "ppo", "kl_placement": "reward", "kl_coefficient": 0.1},
        "cases": {f"{kind}: {level}": case | {"offload": level} for kind, case in kinds.items() for level in ("none", "all")},
    }
    run_ranks("tests.dist.programs.offload", 2, arguments, tmp_path / "out.pt")
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for kind in kinds:
        plain, moved = results[f"{kind}: none"], results[f"{kind}: all"]
        for which in ("weights", "loaded"):
            for ours, theirs in zip(moved[which], plain["weights"], strict=True):
                assert ours.keys() == theirs.keys() and len(ours) > 10
                assert all(torch.equal(ours[name], theirs[name]) for name in ours), (kind, which)
        first, away, _, _, weights_only, last, _ = moved["held"]
        assert set(away.values()) == {0} and first == last == plain["held"][0]
        assert weights_only == {"weights": first["weights"], "gradients": 0, "optimizer": 0}
        # The sizes told before the first step are those after it, whether things are away or not (Adam's step counts aside).
        for sizes in (moved["sizes"], plain["sizes"]):
            assert all(abs(row[part] - first[part]) < 4096 for row in sizes for part in first), (kind, sizes, first)
