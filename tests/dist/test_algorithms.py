"""Every algorithm: the same losses, gradient norms and gradients under every layout and token budget, in fp32 over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist.checkpoints import make_qwen2
from tests.dist.launch import run_ranks
from tests.dist.test_invariance import random_samples, relative

IN_LOSS = {"kl_placement": "loss", "kl_coefficient": 0.2, "entropy_coefficient": 0.01}
IN_REWARD = {"kl_placement": "reward", "kl_coefficient": 0.1}
CORRECTED = {"mismatch_correction": "token-truncate", "mismatch_high": 1.5}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"name": "ppo", "dual_clip": 1.5, "lam": 0.9, **IN_REWARD},
    "grpo": {"name": "grpo", "mismatch_correction": "sequence-mask", "mismatch_high": 1e4, **IN_LOSS},
    "dr_grpo": {"name": "dr_grpo", "mismatch_reject_low": 0.03, "mismatch_reject_high": 3.0},
    "dapo": {"name": "dapo", **CORRECTED},
    "rloo": {"name": "rloo", **IN_REWARD},
    "reinforce_pp": {"name": "reinforce_pp", **IN_REWARD},
    "reinforce_pp_baseline": {"name": "reinforce_pp_baseline", **IN_LOSS},
    "remax": {"name": "remax"},
    "gspo": {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05, **IN_LOSS},
    "cispo": {"name": "cispo", "clip_high": 0.2, **CORRECTED},
    "prime": {"name": "prime", "prime_beta": 0.5},
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"layout": {}, "budgets": [40, 1000]}},
    2: {
        "dp2": {"layout": {}, "budgets": [24]},
        "tp2": {"layout": {"tp": 2}, "budgets": [40]},
        "pp2": {"layout": {"pp": 2}, "budgets": [24]},
        "cp2": {"layout": {"cp": 2}, "budgets": [56]},
    },
}
REFERENCE = "one, 40 tokens"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("algorithms")
    samples = random_samples(seed=5)
    for index, sample in enumerate(samples):
        sample["group_id"] = index // 3
    arguments = {
        "model": str(make_qwen2(folder / "model", seed=1, num_layers=2)),
        "reference": str(make_qwen2(folder / "reference", seed=2, num_layers=2)),
        "samples": samples,
        "algorithms": ALGORITHMS,
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in ALGORITHMS}
    for world_size, layouts in LAYOUTS.items():
        out = folder / f"world{world_size}.pt"
        run_ranks("tests.dist.programs.algorithms", world_size, arguments | {"layouts": layouts}, out)
        for name, cases in torch.load(out, weights_only=True).items():
            found[name] |= cases
    return found


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_losses_and_norms_agree(results: dict[str, dict[str, Any]], name: str) -> None:
    expected = results[name][REFERENCE]["numbers"]
    assert len(results[name]) == 6
    assert expected["policy/grad_norm"] > 1e-4
    for label, found in results[name].items():
        assert found["numbers"].keys() == expected.keys()
        for key, value in expected.items():
            assert found["numbers"][key] == pytest.approx(value, rel=1e-5, abs=2e-7), (label, key)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_gradient_agrees(results: dict[str, dict[str, Any]], name: str) -> None:
    expected = results[name][REFERENCE]["grads"]
    for label, found in results[name].items():
        assert found["grads"].keys() == expected.keys()
        worst = max((relative(found["grads"][key], expected[key]), key) for key in expected)
        assert worst[0] <= 1e-5, (label, worst)


def test_the_batch_is_a_hard_one(results: dict[str, dict[str, Any]]) -> None:
    """Limits, corrections and penalties are in force, so that agreement means something; algorithms differ."""
    numbers = {name: cases[REFERENCE]["numbers"] for name, cases in results.items()}
    for name in ("ppo", "grpo", "dapo", "rloo", "gspo", "cispo"):
        assert 0 < numbers[name]["policy/clip_fraction"] < 1, name
    assert 0 < numbers["dapo"]["mismatch/truncated_fraction"] < 1
    assert 0 < numbers["dr_grpo"]["mismatch/rejected_fraction"] < 1
    assert len({round(row["policy/grad_norm"], 7) for row in numbers.values()}) == len(numbers)
