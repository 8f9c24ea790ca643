"""Keys that are set and change nothing are named, with the reason; what is used is not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.arch.families.registry import read_architecture
from rlx.config.checks.unused import schedule_warnings, unused_keys
from rlx.config.load import load_config, on_paper
from tests.tower import tower

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def unused(run_yaml: Path, *overrides: str) -> list[str]:
    config = load_config(run_yaml, overrides)
    return unused_keys(config, read_architecture(config.model.path))


SFT = ("finetune.objective=sft", "reward.name=''")
DPO = ("finetune.objective=dpo", "reward.name=''")
LOSS = ("algorithm.kl_placement=loss", "algorithm.kl_coefficient=0.1")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([*SFT, "data.system_prompt=Be brief"], "data.system_prompt: changes nothing: rlx sft learns rows as they are"),
        ([*SFT, "data.max_prompt_tokens=7"], "data.max_prompt_tokens: changes nothing: rlx sft limits whole sequences"),
        ([*SFT, "data.curriculum_key=level"], "data.curriculum_key: "),
        ([*SFT, "data.overlong=truncate"], "data.overlong: changes nothing: rlx sft takes finetune.overlong"),
        (
            [*DPO, "algorithm.name=grpo", "algorithm.gamma=0.9"],
            "algorithm.name, algorithm.gamma: changes nothing: not used by rlx dpo",
        ),
        ([*SFT, "reward.name=exact"], "reward.name: changes nothing: not used by rlx sft"),
        ([*SFT, "finetune.beta=0.5"], "finetune.beta: "),
        ([*DPO, "finetune.turns=last"], "finetune.turns: "),
        (["finetune.max_tokens=7"], "finetune.max_tokens: changes nothing: not used by rlx train"),
        (["algorithm.kl_coefficient=0.1"], "algorithm.kl_coefficient: changes nothing: kl_placement is none"),
        (["algorithm.loss_constant=9"], "algorithm.loss_constant: changes nothing: loss_aggregation is not constant"),
        ([*LOSS, "algorithm.kl_target=2"], "algorithm.kl_target: "),
        (["algorithm.mismatch_high=3"], "algorithm.mismatch_high: "),
        (["cluster.device=cpu", "optimizer.offload=true"], "optimizer.offload: changes nothing: on CPUs"),
        (["optimizer.min_lr=1e-7"], "optimizer.min_lr: changes nothing: optimizer.schedule is constant"),
        (["model.reference_path=MODEL"], "model.reference_path: changes nothing: there is no reference model"),
        (["model.moe_z_loss_coefficient=1"], "model.moe_z_loss_coefficient: changes nothing: model.path has no experts"),
        (["model.vision=train"], "model.vision: changes nothing: model.path has no vision tower"),
        (["batching.max_patches_per_micro_batch=9"], "batching.max_patches_per_micro_batch: "),
        (["optimizer.vision_lr_scale=0.1"], "optimizer.vision_lr_scale: changes nothing: model.path has no vision tower"),
        (["evaluation.every=5"], "evaluation.every: changes nothing: there is no evaluation.data"),
        (["cluster.ray_wait_s=5"], "cluster.ray_wait_s: "),
        (["rollout.endpoints=['http://a:1']", "rollout.num_engines=2"], "rollout.num_engines: "),
        (["algorithm.name=reinforce_pp", "critic_optimizer.lr=1"], "critic_optimizer.lr: "),
        ([*SFT, "finetune.epochs=2", "run.steps=7"], "run.steps: changes nothing: finetune.epochs says how long rlx sft is"),
        (["sync.canary_first=0", "sync.canary_every=0", "sync.canary_tolerance=1"], "sync.canary_tolerance: "),
        (["rollout.replay=DATA", "rollout.max_retries=1"], "rollout.max_retries: "),
        (["rollout.replay=DATA", "rollout.fp8=true"], "rollout.fp8: "),
        (["reward.name=http", "reward.memory_mb=99"], "reward.memory_mb: "),
    ],
)
def test_each_reason(run_yaml: Path, tmp_path: Path, overrides: list[str], line: str) -> None:
    paths = {"MODEL": tmp_path / "model", "DATA": tmp_path / "train.jsonl"}
    (found,) = unused(run_yaml, *(re.sub("MODEL|DATA", lambda name: str(paths[name[0]]), word) for word in overrides))
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=0"], ["optimizer.lr: 0: the run learns nothing"]),
        (["optimizer.warmup_steps=100"], ["optimizer.warmup_steps", "100 steps of a run of 100"]),
        (
            ["optimizer.schedule=linear", "optimizer.decay_steps=60"],
            ["optimizer.decay_steps", "from optimizer step 60 on, of 100"],
        ),
        (["critic_optimizer.warmup_steps=400", "algorithm.epochs=4"], ["critic_optimizer.warmup_steps", "400"]),
        ([*SFT, "run.steps=5", "optimizer.warmup_steps=5"], ["optimizer.warmup_steps"]),
    ],
)
def test_schedules_that_do_not_fit_the_run(run_yaml: Path, overrides: list[str], words: list[str]) -> None:
    (found,) = schedule_warnings(load_config(run_yaml, overrides))
    assert all(word in found for word in words), found
    assert not list(schedule_warnings(load_config(run_yaml, ["optimizer.warmup_steps=99", "optimizer.schedule=linear"])))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*SFT, "finetune.turns=last", "data.shuffle=false", "run.steps=3"],
        [*DPO, "finetune.beta=0.5", "finetune.label_smoothing=0.1"],
        [*LOSS, "algorithm.kl_estimator=k2"],
        ["algorithm.loss_aggregation=constant", "algorithm.loss_constant=9"],
        ["optimizer.schedule=cosine", "optimizer.min_lr=1e-7", "optimizer.decay_steps=9"],
        ["algorithm.name=grpo", "rollout.samples_per_prompt=2", "algorithm.normalize_by_std=false"],
        ["evaluation.only=true", "evaluation.data=DATA", "algorithm.kl_coefficient=0.1"],
    ],
)
def test_what_is_used_is_not_named(run_yaml: Path, tmp_path: Path, overrides: list[str]) -> None:
    assert unused(run_yaml, *(word.replace("DATA", str(tmp_path / "train.jsonl")) for word in overrides)) == []


@pytest.mark.parametrize("section", ["optimizer", "critic_optimizer"])
@pytest.mark.parametrize(("learns", "is_used"), [("frozen", False), ("projector", True), ("train", True)])
def test_the_rate_of_a_tower_is_for_one_that_learns(run_yaml: Path, section: str, learns: str, is_used: bool) -> None:
    config = load_config(run_yaml, [f"model.vision={learns}", f"{section}.vision_lr_scale=0.1"])
    arch = replace(read_architecture(config.model.path), vision=tower())
    said = f"{section}.vision_lr_scale: changes nothing: model.vision is frozen"
    assert unused_keys(config, arch) == ([] if is_used else [said])


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "recipes").glob("[!b]*.yaml")), ids=lambda path: path.stem)
def test_recipes_set_nothing_in_vain(recipe: Path) -> None:
    architectures = CONFIGS / "architectures"
    config = on_paper(load_config(recipe, [], architectures), architectures)
    assert unused_keys(config, read_architecture(config.model.path)) == []
