"""RL updates of a mixture of experts: no layout changes them, balancing losses on or off; a checkpoint changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.dist.launch import ROOT, run_ranks
from tests.dist.test_invariance import random_samples, relative

pytestmark = pytest.mark.timeout(1200)  # the first test waits for all ranks, on a busy machine too

SP = {"tp": 2, "sequence_parallel": True}
BALANCED = {"model": {"moe_aux_loss_coefficient": 0.2, "moe_z_loss_coefficient": 0.03}}
PLAIN_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {1: {"one": {}}, 2: {"dp2": {}, "ep2": {"ep": 2}, "tp2": SP}}
AGGREGATIONS = ("token-mean", "seq-mean-token-sum")
RESUMED = {"ep": 2, "distributed": True, "resume": True}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("moe_updates")
    for seed, name in enumerate(("model", "reference")):
        wanted = {"folder": str(folder / name), "families": ["qwen3_moe"], "sequences": [], "seed": seed}
        text = json.dumps(wanted | {"out": str(folder / "unused")})
        command = [sys.executable, "-m", "tests.dist.programs.moe_reference", text]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    arguments = {
        "model": str(folder / "model" / "qwen3_moe"),
        "reference": str(folder / "reference" / "qwen3_moe"),
        "samples": random_samples(seed=3),
        "max_tokens": 40,
        "algorithm": {"name": "ppo", "kl_placement": "loss", "kl_coefficient": 0.2, "lam": 0.9},
    }
    found: dict[str, Any] = {}
    for world_size, layouts in PLAIN_LAYOUTS.items():
        balanced = {f"{name} balanced": layout | BALANCED for name, layout in layouts.items()}
        resumed = {"resumed": RESUMED | BALANCED} if world_size == 2 else {}
        for aggregation in AGGREGATIONS if world_size == 1 else ():
            row = {"algorithm": {"loss_aggregation": aggregation}, "clip": 0.0}
            resumed |= {aggregation: row, f"{aggregation} balanced": row | BALANCED}
        out = folder / f"world{world_size}.pt"
        run_ranks(
            "tests.dist.programs.updates", world_size, arguments | {"layouts": layouts | balanced | resumed}, out, timeout_s=600
        )
        found |= torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("kind", ["", " balanced"])
def test_first_step_agrees(results: dict[str, Any], kind: str) -> None:
    expected = results["one" + kind]
    for layout in PLAIN_LAYOUTS[2]:
        found = results[layout + kind]
        for key, value in expected["steps"][0].items():
            assert found["steps"][0][key] == pytest.approx(value, rel=1e-5, abs=1e-7), (layout, key)
        for role, grads in expected["grads"].items():
            worst = max((relative(found["grads"][role][name], grads[name]), name) for name in grads)
            assert worst[0] <= 1e-5, (layout, role, worst)


@pytest.mark.parametrize("kind", ["", " balanced"])
def test_three_updates_agree(results: dict[str, Any], kind: str) -> None:
    for layout in PLAIN_LAYOUTS[2]:
        for role, weights in results["one" + kind]["weights"].items():
            found = results[layout + kind]["weights"][role]
            worst = max((relative(found[name], weights[name]), name) for name in weights)
            assert worst[0] <= 1e-3, (layout, role, worst)


def test_balancing_moves_the_routers(results: dict[str, Any]) -> None:
    plain, balanced = (results[name]["grads"]["policy"] for name in ("one", "one balanced"))
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert routers and all(relative(balanced[name], plain[name]) > 0.01 for name in routers)


def test_balancing_weighs_the_same_however_the_loss_is_aggregated(results: dict[str, Any]) -> None:
    """What the balancing losses add to a gradient is their own gradient alone."""
    by_token, by_sequence = (
        {
            name: results[f"{kind} balanced"]["grads"]["policy"][name] - grad
            for name, grad in results[kind]["grads"]["policy"].items()
        }
        for kind in AGGREGATIONS
    )
    routers = [name for name in by_token if name.endswith("mlp.gate.weight")]
    assert routers and all(float(by_token[name].abs().max()) > 0 for name in routers)
    assert all(relative(by_sequence[name], by_token[name]) <= 1e-3 for name in routers)


def test_a_resumed_run_takes_the_same_step(results: dict[str, Any]) -> None:
    expected = results["resumed"]["weights"]["policy"]
    assert results["resumed"]["resumed"].keys() == expected.keys()
    assert all(torch.equal(results["resumed"]["resumed"][name], weight) for name, weight in expected.items())
