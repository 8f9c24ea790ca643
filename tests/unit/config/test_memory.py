"""Parameter counts against published ones, the estimate against hand-worked sums, and every recipe on paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.cli.check import plan
from rlx.cli.main import main
from rlx.config.load import ConfigError, load_on_paper
from rlx.config.memory import RESERVE_BYTES, estimate, sizes_of, sizes_of_tree

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
ARCHITECTURES = CONFIGS / "architectures"
RECIPES = sorted(path for path in (CONFIGS / "recipes").glob("*.yaml") if path.name != "base.yaml")

# As the models' own pages count them.
PUBLISHED = {
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "DeepSeek-V3": 671_026_419_200,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    assert sizes_of(str(ARCHITECTURES / name)).total == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_estimate_by_hand() -> None:
    """Two layers of 8 hidden, 4 heads of 2, 16 inner, 10 words; bf16, tp 2, dp 3, GRPO with a reference."""
    tree = json.loads('{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}')
    sizes = sizes_of_tree(tree | {"vocab_size": 10})
    assert sizes.total == 2 * (4 * 64 + 3 * 128) + 2 * 80
    config = load_on_paper(
        CONFIGS / "recipes" / "llama-3.1-8b.yaml", ["parallel.tp=2", "cluster.num_trainer_ranks=6"], ARCHITECTURES
    )
    config = replace(config, batching=replace(config.batching, max_tokens_per_micro_batch=100))
    found = estimate(config, sizes)
    local = sizes.total // 2
    assert (found.weights, found.gradients, found.other_models) == (2 * local, 4 * local, 2 * local)
    assert found.optimizer == 12 * local // 3
    assert found.logits == 100 * 10 // 2 * 10
    kept = 2 * 100 * 8 // 2 * 2  # full recomputation with sequence parallelism: the inputs of two layers, halved
    at_work = 2 * 100 * (10 * 8 // 2 + (2 * 2 * 8 + 3 * 16) // 2)
    assert found.activations == kept + at_work
    assert found.trainer == 8 * local + found.optimizer + found.logits + found.activations + RESERVE_BYTES


def test_fine_tuning_holds_what_it_trains() -> None:
    """No engines and no critic; a reference for preferences alone, and no logits of a reward model."""
    on_paper = (CONFIGS / "recipes" / "llama-3.1-8b.yaml", ARCHITECTURES)
    found = {}
    for objective in ("sft", "dpo", "rm"):
        config = load_on_paper(on_paper[0], [f"finetune.objective={objective}"], on_paper[1])
        found[objective] = estimate(config, sizes_of(config.model.path))
    assert found["sft"].other_models == found["rm"].other_models == 0
    assert found["dpo"].other_models == found["dpo"].weights
    assert found["rm"].logits == 0 < found["dpo"].logits
    assert all(one.engine_weights == 0 for one in found.values())


def test_experts_are_split_over_ep_and_pipelines_take_the_fullest_stage() -> None:
    tree = json.loads((ARCHITECTURES / "DeepSeek-V3" / "config.json").read_text())
    sizes = sizes_of_tree(tree)
    config = load_on_paper(CONFIGS / "recipes" / "deepseek-v3.yaml", [], ARCHITECTURES)
    found = estimate(config, sizes)
    layers = 8  # of 61 over 8 stages
    dense = layers * (sizes.attention + sizes.moe_mlp) + sizes.embedding
    expected = 2 * (dense / 8 + layers * sizes.expert_layer / 32)
    assert found.weights == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_on_paper(recipe: Path) -> None:
    config = load_on_paper(recipe, [], ARCHITECTURES)
    assert plan(config)
    found = estimate(config, sizes_of(config.model.path))
    assert found.trainer < 0.95 * config.cluster.gpu_memory_gib * 2**30


def test_what_does_not_fit_is_refused_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(CONFIGS / "recipes" / "llama-3.1-70b.yaml")
    arguments = ["check", recipe, "--on-paper", str(ARCHITECTURES)]
    assert main(arguments) == 0
    assert "# node 0-3: [T T T T T T T T]" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"gpu_memory_gib: a trainer rank needs about \d+ GiB of 40"):
        plan(load_on_paper(recipe, ["cluster.gpu_memory_gib=40"], ARCHITECTURES))
    with pytest.raises(ConfigError, match=r"rollout\.tp: 131 GiB of weights .* use at least 3"):
        plan(load_on_paper(recipe, ["rollout.tp=1"], ARCHITECTURES))
    with pytest.raises(ConfigError, match=r"12 trainer nodes or 32 ranks|cannot be split evenly"):
        plan(load_on_paper(recipe, ["cluster.num_trainer_ranks=96"], ARCHITECTURES))
