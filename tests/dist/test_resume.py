"""A checkpoint goes on under another layout, with an optimizer held otherwise, and at the rates of the new configuration."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.dist.checkpoints import VOCAB_SIZE, make_qwen2
from tests.dist.launch import run_ranks
from tests.dist.test_invariance import relative

WHOLE, SHARDED = {"optimizer": {"distributed": False}}, {"optimizer": {"distributed": True}}
BF16 = {"dtype": "bf16"}
VPP = {"layout": {"pp": 2, "vpp": 2}}
LINEAR = {"steps": 4, "optimizer": {"lr": 1e-3, "schedule": "linear"}}
# What the optimizer does differently from step 3 of 8 on.
CHANGED = {"steps": 8, "optimizer": {"lr": 4e-4, "min_lr": 1e-4, "schedule": "cosine", "warmup_steps": 1}}
OTHER_ADAM = {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.3}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "whole": {"save": WHOLE, "load": WHOLE},
        "whole to sharded": {"save": WHOLE, "load": SHARDED},
        "sharded to whole, bf16": {"save": SHARDED | BF16, "load": WHOLE | BF16},
        "an older checkpoint, bf16": {"save": BF16, "load": BF16, "as_before": True},
        "pipeline, tied embedding": {"save": VPP, "load": VPP},
        "experts together": {"save": {"moe": True, "layout": {"ep": 2}}, "load": {"moe": True}},
        "experts apart": {"save": {"moe": True}, "load": {"moe": True, "layout": {"ep": 2}}},
        "fewer ranks": {"save": {"layout": {"cp": 2}}},
    },
    1: {
        "fewer ranks": {"load": {}},
        "rates": {"save": LINEAR, "load": CHANGED | {"optimizer": CHANGED["optimizer"] | OTHER_ADAM}},
        "warm-up": {"save": {"optimizer": {"warmup_steps": 2}}},
    },
}


def make_moe(folder: Path) -> Path:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=80, moe_intermediate_size=20, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        mlp_only_layers=[0], initializer_range=0.2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    arguments = {
        "model": str(make_qwen2(folder / "model", seed=1)),
        "moe": str(make_moe(folder / "moe")),
        "folder": str(folder),
    }
    found: dict[str, dict[str, Any]] = {}
    for world_size, cases in CASES.items():
        out = folder / f"world{world_size}.pt"
        run_ranks("tests.dist.programs.resume", world_size, arguments | {"cases": cases}, out, timeout_s=600)
        for name, result in torch.load(out, weights_only=True).items():
            found.setdefault(name, {}).update(result)
    return found


@pytest.mark.parametrize("name", ["whole", "an older checkpoint, bf16", "pipeline, tied embedding"])
def test_the_same_way_takes_the_same_step(results: dict[str, dict[str, Any]], name: str) -> None:
    expected, found = results[name]["uninterrupted"], results[name]["resumed"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize(
    "name", ["whole to sharded", "sharded to whole, bf16", "experts together", "experts apart", "fewer ranks"]
)
def test_another_way_takes_the_same_step(results: dict[str, dict[str, Any]], name: str) -> None:
    expected, found = results[name]["uninterrupted"], results[name]["resumed"]
    assert found.keys() == expected.keys()
    # Adam divides by the root of the moments: another order of additions shows there.
    worst = max((relative(found[key].float(), weight.float()), key) for key, weight in expected.items())
    assert worst[0] <= 1e-4, worst


def test_the_schedule_moves_after_the_update(results: dict[str, dict[str, Any]]) -> None:
    assert results["rates"]["rates"] == pytest.approx([1e-3, 7.5e-4, 5e-4])
    assert results["warm-up"]["rates"] == pytest.approx([0.0, 1e-3, 2e-3])  # as in transformers and Megatron


def test_rates_come_from_the_configuration(results: dict[str, dict[str, Any]]) -> None:
    found = results["rates"]
    # The second step after a warm-up of one, of seven to min_lr.
    rate = 1e-4 + 3e-4 * 0.5 * (1 + cos(pi * 1 / 7))
    assert found["resumed rate"] == pytest.approx(rate)
    for group in found["groups"]:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.99), 1e-6, pytest.approx(rate))
        assert group["weight_decay"] in (0.0, 0.3)  # none on norms and biases
    assert any(group["weight_decay"] for group in found["groups"])
    assert any(not torch.equal(found["resumed"][key], weight) for key, weight in found["uninterrupted"].items())
