"""Vision-language families equal transformers in every layout: log-probs, gradients of text and tower, weights bit for bit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rlx.arch.families.registry import read_architecture
from rlx.cli.score import read_asked
from rlx.data.images.intake import ImageIntake
from rlx.data.images.pixels import image_file
from tests.dist.launch import ROOT, run_ranks
from tests.dist.vision_folders import GRIDS, IMAGE, START, folder_of, grid_of, sequences

pytestmark = pytest.mark.timeout(600)

CASES = ["qwen2.5-vl tied", "qwen2.5-vl one kv head", "qwen2-vl"]
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "dp2": {},
        "tp2": {"tp": 2, "recompute": "selective"},
        "tp2 sp": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2, "recompute": "full"},
        "pp2 vpp2": {"pp": 2, "vpp": 2},
        "cp2": {"cp": 2},
    },
    4: {
        "tp2 pp2 sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
        "tp2 cp2 sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    },
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
# What every run of the tests covers; the others are slow.
ONE_HEAD = {"one", "tp2", "tp2 cp2 sp"}
PLAIN = {"one", "tp2 sp", "pp2 vpp2"}
QUICK = {
    name: [CASES[0], *CASES[1:2] * (name in ONE_HEAD), *CASES[2:] * (name in PLAIN)]
    for layouts in LAYOUTS.values()
    for name in layouts
}
# Besides, under one layout each: an export, a checkpoint written, and it read; towers that learn less.
BESIDES = {"exports": "tp2 pp2 sp", "saves": "tp2", "loads": "tp2 cp2 sp", "learns": "one"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints, their images, and what transformers computes from them."""
    root = tmp_path_factory.mktemp("vision")
    command = [sys.executable, "-m", "tests.dist.vision_cases", str(root)]
    subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=ROOT, check=True, timeout=240)
    return root


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, root: Path) -> dict[str, Any]:
    """Layout, then case, to what was measured there."""
    cases = QUICK if request.param == "quick" else dict.fromkeys(QUICK, CASES)
    found: dict[str, Any] = {}
    for world_size, layouts in LAYOUTS.items():
        out = root / f"{request.param}{world_size}.json"
        arguments = {"root": str(root), "layouts": layouts, "cases": cases, **BESIDES}
        run_ranks("tests.dist.programs.vision", world_size, arguments, out, timeout_s=400)
        found |= json.loads(out.read_text())
    return found


def over(results: dict[str, Any], what: str, limit: float) -> dict[str, Any]:
    """The cases beyond ``limit``, with the value and the place."""
    assert set(results) == set(QUICK) and all(set(cases) >= set(QUICK[name]) for name, cases in results.items())
    measured = {f"{case} under {layout}": found for layout, cases in results.items() for case, found in cases.items()}
    assert any(what in found for found in measured.values())
    return {where: found[what] for where, found in measured.items() if what in found and not found[what][0] <= limit}


def test_logprobs_equal_transformers(results: dict[str, Any]) -> None:
    assert over(results, "logprobs", 2e-5) == {}


def test_gradients_of_text_and_tower_equal_transformers(results: dict[str, Any]) -> None:
    assert over(results, "gradients", 1e-4) == {}
    assert over(results, "replicas", 0.0) == {}


@pytest.mark.parametrize("learns", ["frozen", "projector"])
def test_what_is_frozen_has_no_gradient_and_changes_none(results: dict[str, Any], learns: str) -> None:
    assert over(results, learns, 1e-4) == {}


@pytest.mark.parametrize("learns", ["frozen", "projector"])
def test_what_is_frozen_is_known_by_name(results: dict[str, Any], learns: str) -> None:
    assert all(found[f"{learns} constant"] for found in results["one"].values())


def test_features_of_a_frozen_tower_are_made_once_a_batch(results: dict[str, Any]) -> None:
    """Two scores and an update: a frozen tower sees each image once, one that learns once a pack and pass."""
    once = sum(math.prod(grid_of(name)) for name in GRIDS)
    for found in results["one"].values():
        assert found["frozen patches"] == [once, True]
        assert found["projector patches"][0] > 3 * once and found["projector patches"][1]


@pytest.mark.parametrize("learns", ["train", "projector"])
def test_a_checkpoint_goes_on_under_another_layout(results: dict[str, Any], learns: str) -> None:
    """Written under TP2 with plain Adam, read under TP2 x CP2 with SP by the distributed one."""
    for found in results["tp2 cp2 sp"].values():
        same, apart = found[f"{learns} checkpoint"]
        assert same and apart < 1e-2


def test_a_tower_learns_at_its_own_rate(results: dict[str, Any]) -> None:
    """A step of what ``vision_lr_scale`` is for is a quarter of the step without it, any other step the same."""
    found = {(layout, how): pair for layout, cases in results.items() for how, pair in cases[CASES[0]]["scaled"].items()}
    assert len(found) == 4 * len(QUICK)
    assert {where: pair for where, pair in found.items() if not (pair[0] <= 1e-3 and 0.2 <= pair[1] <= 0.26)} == {}


def test_the_rate_of_a_tower_follows_the_schedule(results: dict[str, Any]) -> None:
    """Warm-up and decay to min_lr, on stages without a tower too."""
    for layout, cases in results.items():
        rates = cases[CASES[0]]["rates"]
        assert [pair[-1] for pair in rates] == pytest.approx([0.0, 1.0, 0.75, 0.5, 0.25]), layout
        assert all(pair[0] == pytest.approx(pair[-1] / 4) for pair in rates), layout


@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_weights_come_back_bit_for_bit(results: dict[str, Any], how: str) -> None:
    wrong = {f"{case} under {layout}": m[how] for layout, cases in results.items() for case, m in cases.items() if m.get(how)}
    assert wrong == {} and any(how in found for cases in results.values() for found in cases.values())


@pytest.mark.slow
def test_rlx_score_takes_images(root: Path) -> None:
    """The first placeholders of a line are images, those that follow are text; files of any name and format, beside the lines."""
    keys, case = json.loads((root / "keys.json").read_text()), CASES[1]
    for name, key in keys.items():
        Image.open(image_file(root / "images", key)).save(root / f"{name}.image", "BMP")
    rows = [
        {"input_ids": sequence.token_ids}
        | ({"images": [f"{name}.image" for name, _ in sequence.images]} if sequence.images else {})
        for sequence in sequences()
    ]
    asked, answered = root / "asked.jsonl", root / "answered.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": folder_of(root, case, "fp32"),
        "tokens": asked,
        "out": answered,
        "tp": 2,
        "device": "cpu",
        "max-tokens": 160,
    }
    command = [sys.executable, "-m", "rlx.cli.main", "score", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = torch.load(root / "reference.pt", weights_only=True)[case]["logprobs"]
    found = [json.loads(line)["logprobs"] for line in answered.read_text().splitlines()]
    worst = max(float((torch.tensor(row) - want).abs().max()) for row, want in zip(found, expected, strict=True))
    assert worst <= 2e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "a.png"}, "images must be a list of paths"),
        ({"images": ["none.png"]}, "none.png: No such file"),
        ({"images": [3]}, "an image must be a path, bytes or base64"),
        ({"images": ["wide", "wide", "wide"]}, "image 2 is 45 tokens, but input_ids have 1 of 262"),
        ({"images": ["config.json"]}, "config.json: no image of a known format"),
    ],
)
def test_what_rlx_score_cannot_take_is_named_with_its_line(
    root: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    model = folder_of(root, CASES[0], "fp32")
    keys = json.loads((root / "keys.json").read_text())
    (root / "config.json").write_text("{}")
    if isinstance(change["images"], list):
        change = {"images": [str(image_file(root / "images", keys.get(n))) if n in keys else n for n in change["images"]]}
    asked = root / "wrong.jsonl"
    asked.write_text(json.dumps({"input_ids": sequences()[0].token_ids} | change) + "\n")
    with pytest.raises(ValueError, match=f"wrong.jsonl:1.*{words}"):
        read_asked(asked, str(model), read_architecture(model), tmp_path)


def test_rlx_score_resizes_as_training_does_and_only_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = folder_of(root, CASES[0], "fp32"), tmp_path / "asked.jsonl"
    Image.new("L", (100, 60)).save(tmp_path / "small.jpg")
    asked.write_text(json.dumps({"input_ids": [START, *[IMAGE] * 8, 5, IMAGE], "images": ["small.jpg"]}) + "\n")
    first = read_asked(asked, str(model), read_architecture(model), tmp_path / "images")
    [[span]] = first.images
    assert (span.start, span.grid) == (1, (1, 4, 8))
    with Image.open(image_file(tmp_path / "images", span.key)) as kept:
        assert (kept.size, kept.mode) == ((112, 56), "RGB")
    monkeypatch.setattr(ImageIntake, "_take", None)  # ranks know what is there
    assert read_asked(asked, str(model), read_architecture(model), tmp_path / "images") == first
    (model / "preprocessor_config.json").rename(tmp_path / "away.json")
    with pytest.raises(ValueError, match=r"asked.jsonl:1: .*preprocessor_config.json"):
        read_asked(asked, str(model), read_architecture(model), tmp_path / "images")
    (tmp_path / "away.json").rename(model / "preprocessor_config.json")


def test_images_for_a_model_of_text_are_refused(root: Path) -> None:
    arch = replace(read_architecture(folder_of(root, CASES[0], "fp32")), vision=None)
    asked = root / "text.jsonl"
    asked.write_text(json.dumps({"input_ids": [1, 2], "images": ["a.png"]}) + "\n")
    with pytest.raises(ValueError, match=r"text.jsonl:1.*images for a model of text"):
        read_asked(asked, "none", arch, root)
