"""Mixture-of-experts families against transformers in fp32: log-probs, gradients, export, under every kind of layout."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.launch import ROOT, run_ranks

pytestmark = pytest.mark.timeout(1200)  # the first test waits for all ranks, on a busy machine too

FAMILIES = ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3"]
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {"ep2": {"ep": 2}, "tp2": SP, "tp2 ep2 etp1": SP | {"ep": 2, "etp": 1}, "pp2": {"pp": 2}, "cp2": {"cp": 2}},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tp2 ep2": SP | {"ep": 2},
    "tp2 pp2": SP | {"pp": 2},
    "pp2 ep2": {"pp": 2, "ep": 2},
}
QUICK = {"families": ["qwen2_moe", "deepseek_v3"]}
LAYOUTS[4] = {name: layout | QUICK for name, layout in FOUR_RANKS.items()}
BALANCED = {"family": "qwen3_moe", "aux": 0.3, "z": 0.05}
BALANCING = {
    "families": [BALANCED["family"]],
    "options": {"moe_aux_loss_coefficient": BALANCED["aux"], "moe_z_loss_coefficient": BALANCED["z"], "recompute": "full"},
}
BALANCED_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one balanced": BALANCING},
    2: {
        "ep2 balanced": BALANCING | {"ep": 2},
        "tp2 balanced": BALANCING | SP,
        "pp2 balanced": BALANCING | {"pp": 2},
        "cp2 balanced": BALANCING | {"cp": 2},
    },
    4: {},
}
CASES = [
    (name, family)
    for layouts in LAYOUTS.values()
    for name, layout in layouts.items()
    for family in layout.get("families", FAMILIES)
]


def random_sequences(lengths: list[int]) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(131) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("moe")
    arguments: dict[str, Any] = {
        "folder": str(folder),
        "families": FAMILIES,
        "sequences": random_sequences([5, 17, 2, 9, 13, 3]),
        "balanced": BALANCED,
    }
    reference = folder / "reference.pt"
    command = [sys.executable, "-m", "tests.dist.programs.moe_reference", json.dumps(arguments | {"out": str(reference)})]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    results: dict[str, Any] = {"reference": torch.load(reference, weights_only=True), "folder": folder, "arguments": arguments}
    for world_size, layouts in LAYOUTS.items():
        out = folder / f"world{world_size}.pt"
        run_ranks("tests.dist.programs.moe", world_size, arguments | {"layouts": layouts | BALANCED_LAYOUTS[world_size]}, out, timeout_s=600)
        results |= torch.load(out, weights_only=True)
    return results


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_logprobs_equal_transformers(found: dict[str, Any], layout: str, family: str) -> None:
    expected = found["reference"][family]["logprobs"]
    worst = max(
        float((torch.tensor(row) - want).abs().max())
        for row, want in zip(found[layout][family]["logprobs"], expected, strict=True)
    )
    assert worst <= 2e-5, worst


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_gradients_equal_transformers(found: dict[str, Any], layout: str, family: str) -> None:
    expected, grads = found["reference"][family]["grads"], found[layout][family]["grads"]
    held_still = {name for name in grads if name.endswith("e_score_correction_bias")}
    assert grads.keys() - held_still == expected.keys()
    worst = max((relative(grads[name], want), name) for name, want in expected.items())
    assert worst[0] <= 1e-4, worst


@pytest.mark.parametrize("layout", [name for layouts in BALANCED_LAYOUTS.values() for name in layouts])
def test_balancing_losses_follow_their_formulas(found: dict[str, Any], layout: str) -> None:
    """In every layout the gradients are those of losses written out sequence by sequence, padding left out."""
    reference = found["reference"][BALANCED["family"]]
    grads = found[layout][BALANCED["family"]]["grads"]
    worst = max((relative(grads[name], want), name) for name, want in reference["balanced"].items())
    assert worst[0] <= 1e-4, worst
    routers = [name for name in reference["grads"] if name.endswith("mlp.gate.weight")]
    assert all(relative(reference["grads"][name], reference["balanced"][name]) > 0.05 for name in routers)


@pytest.mark.slow
def test_every_family_on_four_ranks(found: dict[str, Any]) -> None:
    out = found["folder"] / "every.pt"
    run_ranks("tests.dist.programs.moe", 4, found["arguments"] | {"layouts": FOUR_RANKS}, out, timeout_s=600)
    results = found | torch.load(out, weights_only=True)
    for layout in FOUR_RANKS:
        for family in FAMILIES:
            test_logprobs_equal_transformers(results, layout, family)
            test_gradients_equal_transformers(results, layout, family)
            test_export_is_bit_exact(results, layout, family)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_export_is_bit_exact(found: dict[str, Any], layout: str, family: str) -> None:
    source = load_file(found["folder"] / family / "model.safetensors")
    exported: dict[str, torch.Tensor] = {}
    for file in Path(found[layout][family]["export"]).glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        assert tensor.dtype == exported[name].dtype and torch.equal(tensor, exported[name]), name
