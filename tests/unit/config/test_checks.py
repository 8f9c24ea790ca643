"""Cross-field checks: each contradiction is found, named by its keys, and goes away when resolved."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rlx.algos.registry import ALGORITHMS, make_algorithm
from rlx.config.algorithm import NEEDS_GROUPS, PRESETS, WITH_CRITIC, AlgorithmConfig
from rlx.config.checks.unused import REMOTE_REWARDS
from rlx.rewards.registry import REMOTE, VERIFIERS
from rlx.types.layout import ParallelDims

Problems = Callable[..., tuple[str, ...]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.top_p=0.9"], ["rollout.top_p", "must be 1"]),
        (["rollout.top_k=50"], ["rollout.top_k", "-1"]),
        (["rollout.temperature=0"], ["rollout.temperature", "greedy"]),
        (["rollout.engine=sglang", "rollout.tp=5"], ["rollout.tp", "5", "12 attention heads"]),
        (["rollout.stop_token_ids=[7, 131]"], ["rollout.stop_token_ids", "131", "vocabulary of 131"]),
        (["batching.max_tokens_per_micro_batch=1279"], ["batching.max_tokens_per_micro_batch", "1024 + 256 = 1280"]),
        (["optimizer.warmup_steps=9", "optimizer.decay_steps=9"], ["optimizer.warmup_steps", "optimizer.decay_steps"]),
        (["model.layer_spec=transformer_engine"], ["model.layer_spec", "model.dtype bf16"]),
        (
            [
                "algorithm.kl_controller=adaptive",
                "algorithm.kl_placement=reward",
                "algorithm.kl_coefficient=0.1",
                "algorithm.kl_target=0",
            ],
            ["algorithm.kl_target", "above 0"],
        ),
        (["rollout.endpoints=['host:1']"], ["rollout.endpoints", "http://"]),
        (["rollout.endpoints=['http://']"], ["rollout.endpoints", "http://"]),
        (["rollout.endpoints=['http://host:30k']"], ["rollout.endpoints", "http://"]),
        (["rollout.endpoints=['http://a host:1']"], ["rollout.endpoints", "http://"]),
        (["data.template_date=2025-02-30"], ["data.template_date", "2025-01-31"]),
        (["algorithm.num_mini_batches=9"], ["algorithm.num_mini_batches", "data.prompts_per_step", "8"]),
        (["algorithm.name=grpo"], ["rollout.samples_per_prompt", "grpo", "at least 2"]),
        (["algorithm.kl_controller=adaptive"], ["algorithm.kl_controller", "algorithm.kl_placement reward"]),
        (["algorithm.kl_placement=loss"], ["algorithm.kl_coefficient", "above 0"]),
        (
            ["algorithm.kl_controller=adaptive", "algorithm.kl_placement=loss", "algorithm.kl_coefficient=0.1"],
            ["algorithm.kl_controller", "loss"],
        ),
        (["algorithm.gamma=1.01"], ["algorithm.gamma", "at most 1"]),
        (["optimizer.min_lr=0.1"], ["optimizer.min_lr", "optimizer.lr", "1e-06"]),
        (["critic_optimizer.beta2=1"], ["critic_optimizer.beta2", "below 1"]),
        (["run.dir=~/x"], ["run.dir", "a folder called ~"]),
        (["rollout.record=~/x.jsonl"], ["rollout.record", "a folder called ~"]),
        (["sync.dir=/tmp/x"], ["sync.dir", "sync.transport=disk", "stream"]),
        (["cluster.device=cpu", "model.layer_spec=transformer_engine"], ["model.layer_spec", "cluster.device"]),
        (["optimizer.offload=true", "optimizer.distributed=false"], ["optimizer.offload", "optimizer.distributed"]),
        (["model.recompute_layers=2"], ["model.recompute_layers", "model.recompute is none", "full"]),
        (["parallel.vpp=2"], ["parallel.vpp", "parallel.pp > 1"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "parallel.tp > 1"]),
        (["parallel.tp=8"], ["parallel.tp", "12 attention heads"]),
        (["parallel.tp=6"], ["parallel.tp", "4 key-value heads"]),
        (["parallel.pp=13"], ["parallel.pp", "12 layers"]),
        (["parallel.pp=2", "parallel.vpp=7"], ["parallel.vpp", "12 layers"]),
        (["parallel.ep=2", "cluster.num_trainer_ranks=2"], ["parallel.ep", "dense"]),
        (["parallel.tp=2", "cluster.num_trainer_ranks=3"], ["cluster.num_trainer_ranks", "parallel.tp", "3"]),
        (["parallel.etp=2"], ["cluster.num_trainer_ranks", "parallel.etp"]),
        (["data.max_prompt_tokens=4000"], ["data.max_prompt_tokens", "rollout.max_new_tokens", "4256", "4096"]),
        (["data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl"]),
        (["data.train=prompts.csv"], ["data.train", ".jsonl or .parquet"]),
        (["evaluation.data=nowhere.parquet"], ["evaluation.data", "nowhere.parquet"]),
        (["data.chat_template=none.jinja"], ["data.chat_template", "none.jinja"]),
        (["model.tokenizer_path=/nowhere"], ["model.tokenizer_path", "/nowhere"]),
        (["model.critic_path=/nowhere"], ["model.critic_path", "/nowhere"]),
        (["model.path=/nowhere"], ["model.path", "/nowhere"]),
        (["rollout.replay=none.jsonl"], ["rollout.replay", "none.jsonl"]),
        (["reward.name='none.py:f'"], ["reward.name", "none.py"]),
        (["reward.name='file:f'"], ["reward.name", "path/to/file.py:function"]),
        (["algorithm.loss='none.py:f'"], ["algorithm.loss", "no such file none.py"]),
        (["algorithm.loss='file:f'"], ["algorithm.loss", "path/to/file.py:function"]),
        (["algorithm.advantages=leave_one_out"], ["algorithm.advantages", "algorithm.name ppo", "grpo"]),
    ],
)
def test_contradiction_is_one_problem_that_names_its_keys(problems: Problems, overrides: list[str], words: list[str]) -> None:
    (problem,) = problems(*overrides)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["embedded engine", "rollout.engine=sglang"]),
        (["rollout.endpoints=['http://a:1']"], ["rollout.endpoints empty"]),
        (["rollout.engine=sglang"], ["rollout.dtype is fp32", "use bf16"]),
        (["cluster.device=cpu"], ["cluster.device is cpu"]),
        (["rollout.engine=sglang"], ["hidden states", "96 wide", "rollout.tp = 1"]),
    ],
)
def test_where_engines_cannot_hold_fp8_every_reason_is_said(problems: Problems, overrides: list[str], words: list[str]) -> None:
    found = problems("rollout.fp8=true", *overrides)
    assert all(problem.startswith("rollout.fp8: ") for problem in found)
    assert any(all(word in problem for word in words) for problem in found)
    assert not problems("rollout.replay=" + __file__, "rollout.fp8=true")  # no engine, no format


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.name=grpo", "rollout.samples_per_prompt=2"],
        ["algorithm.kl_controller=adaptive", "algorithm.kl_placement=reward", "algorithm.kl_coefficient=0.1"],
        ["algorithm.num_mini_batches=8"],
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2", "parallel.vpp=3"],
        ["model.recompute=full", "model.recompute_layers=2"],
        ["parallel.tp=12"],
        ["data.max_prompt_tokens=3840"],
        ["rollout.endpoints=['http://host:1']"],
    ],
)
def test_what_fits_is_accepted(problems: Problems, overrides: list[str]) -> None:
    assert problems(*overrides) == ()


def test_replay_contradicts_endpoints_and_recording_over_itself(problems: Problems, tmp_path: Path) -> None:
    file = tmp_path / "groups.jsonl"
    file.write_text("")
    assert problems(f"rollout.replay={file}", f"rollout.record={tmp_path}/new.jsonl") == ()
    (clash,) = problems(f"rollout.replay={file}", f"rollout.record={tmp_path}/./groups.jsonl")
    assert "rollout.record" in clash and "rollout.replay" in clash
    (clash,) = problems(f"rollout.replay={file}", "rollout.endpoints=['http://a:1']")
    assert "rollout.endpoints" in clash


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
        (None, "config.json is missing"),
        ("{", "not readable JSON"),
        ("[]", "JSON object"),
    ],
)
def test_model_folder_is_looked_at(problems: Problems, tmp_path: Path, change: object, word: str) -> None:
    file = tmp_path / "model" / "config.json"
    whole = json.loads(file.read_text())
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(whole | change) if isinstance(change, dict) else str(change))
    (problem,) = problems()
    assert problem.startswith("model.path") and word in problem


def test_reference_of_another_shape_is_refused(problems: Problems, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    whole = json.loads((tmp_path / "model" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(whole | {"max_position_embeddings": 9999}))
    assert problems(f"model.reference_path={other}") == ()
    (other / "config.json").write_text(json.dumps(whole | {"num_hidden_layers": 6}))
    (problem,) = problems(f"model.reference_path={other}")
    assert "model.reference_path" in problem and "model.path" in problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.ep=4", "cluster.num_trainer_ranks=4"], ["parallel.ep", "4", "6 experts"]),
        (["parallel.tp=2"], ["parallel.sequence_parallel", "mixture of experts"]),
        (["parallel.etp=3", "cluster.num_trainer_ranks=3"], ["parallel.etp", "3", "20 hidden units"]),
    ],
)
def test_layout_of_experts(problems: Problems, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | experts))
    assert problems("parallel.ep=2", "cluster.num_trainer_ranks=2") == ()
    (problem,) = problems(*overrides)
    assert all(word in problem for word in words), problem


def test_layout_agrees_with_parallel_dims(problems: Problems, seed: int) -> None:
    draw = random.Random(seed)
    refused = 0
    for _ in range(60):
        sizes = {name: draw.choice([1, 1, 2, 3]) for name in ("tp", "pp", "vpp", "cp")} | {"etp": draw.choice([1, 2, 3])}
        world = draw.choice([1, 2, 4, 6, 12, 18, 36])
        sequence_parallel = draw.random() < 0.3
        try:
            ParallelDims(world_size=world, sequence_parallel=sequence_parallel, **sizes)
            fits = True
        except ValueError:
            fits = False
        overrides = [f"parallel.{name}={size}" for name, size in sizes.items()]
        found = problems(
            *overrides, f"cluster.num_trainer_ranks={world}", f"parallel.sequence_parallel={str(sequence_parallel).lower()}"
        )
        about_layout = [
            line for line in found if all(word not in line for word in ("attention heads", "key-value", "layers", "MLP", "rows"))
        ]
        assert fits == (not about_layout), (sizes, world, sequence_parallel, found)
        refused += not fits
    assert 0 < refused < 60


def test_names_that_config_may_not_import_agree_with_their_homes() -> None:
    assert set(PRESETS) == set(ALGORITHMS)
    assert all(make_algorithm(AlgorithmConfig(name=name)).needs_critic == (name in WITH_CRITIC) for name in ALGORITHMS)
    assert set(REMOTE_REWARDS) == set(REMOTE)
    page = (Path(__file__).resolve().parents[3] / "docs" / "rewards.md").read_text()
    assert all(f"| `{name}` |" in page for name in VERIFIERS)


@pytest.mark.parametrize("name", NEEDS_GROUPS)
def test_a_group_of_one_is_refused_where_answers_are_compared(problems: Problems, name: str) -> None:
    found = problems(f"algorithm.name={name}")
    assert f"algorithm.name {name} compares answers to one prompt and needs at least 2, got 1" in found[0]
    assert problems(f"algorithm.name={name}", "rollout.samples_per_prompt=2") == ()


FINETUNE = ("reward.name=''", "finetune.objective=dpo")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.max_tokens=5000"], ["finetune.max_tokens", "4096 positions", "batching.max_tokens_per_micro_batch", "10000"]),
        (["finetune.max_tokens=101", "parallel.cp=2", "batching.max_tokens_per_micro_batch=207"], ["208"]),
        (["finetune.epochs=0"], ["finetune.epochs", "above 0"]),
        (["finetune.beta=0"], ["finetune.beta", "dpo"]),
        (["finetune.label_smoothing=0.5"], ["finetune.label_smoothing", "below 0.5"]),
        (["cluster.rollout_nodes=1"], ["cluster.rollout_nodes", "no engines"]),
        (["data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl"]),
        (["parallel.tp=8"], ["parallel.tp", "12 attention heads"]),
    ],
)
def test_fine_tuning_has_checks_of_its_own(problems: Problems, overrides: list[str], words: list[str]) -> None:
    text = "\n".join(problems(*FINETUNE, *overrides))
    assert all(word in text for word in words), text


def test_fine_tuning_asks_nothing_of_rollouts_and_rewards(problems: Problems) -> None:
    ignored = ("rollout.top_p=0.5", "data.max_prompt_tokens=4096", "rollout.replay=none.jsonl", "algorithm.name=grpo")
    assert problems(*FINETUNE, *ignored, "finetune.max_tokens=4096") == ()
    assert problems("finetune.objective=sft", "finetune.max_tokens=4096", "batching.max_tokens_per_micro_batch=4096") == ()


def test_reinforcement_learning_needs_a_reward(problems: Problems) -> None:
    (problem,) = problems("reward.name=''")
    assert "reward.name: required but missing" in problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=null"], ["data.train: required unless data.sources"]),
        (["data.sources.a.path=x.jsonl"], ["data.sources", "leave one of the two out"]),
        (["evaluation.sets.a.path=x.jsonl"], ["evaluation.sets.a.path", "no such file x.jsonl"]),
        (["evaluation.sets.a.path=x.csv"], ["evaluation.sets.a.path", ".jsonl or .parquet", "reasoning-gym:TASK"]),
        (["evaluation.sets.a.path=reasoning-gym:t", "evaluation.sets.a.samples_per_prompt=4"], ["evaluation.sets.a.temperature"]),
        (["evaluation.sets={'a b': {path: 'reasoning-gym:t'}}"], ["evaluation.sets", "'a b'"]),
        (["evaluation.sets.a.tempreature=1", "evaluation.sets.a.path=reasoning-gym:t"], ["evaluation.sets.a.temperature"]),
        (["evaluation.sets.a={}"], ["evaluation.sets.a.path: required but missing"]),
        (["evaluation.sets.a=x.jsonl"], ["evaluation.sets.a", "section of keys"]),
        (["evaluation.at_start=true"], ["evaluation.at_start", "evaluation.data or evaluation.sets"]),
        (["evaluation.at_start=true", "finetune.objective=sft"], ["evaluation.at_start", "evaluation.data"]),
        (["evaluation.only=true"], ["evaluation.only", "evaluation.data or evaluation.sets"]),
        (["data.train=null", "data.sources.a={path: 'reasoning-gym:t', weight: 0}"], ["data.sources.a.weight", "above 0"]),
    ],
)
def test_a_fault_of_a_source_names_it(problems: Problems, overrides: list[str], words: list[str]) -> None:
    found = " ".join(problems(*overrides))
    assert all(word in found for word in words), found


def test_sources_and_sets_fit(problems: Problems) -> None:
    source = "data.sources.a={path: 'reasoning-gym:chain_sum', weight: 2, args: {size: 9}}"
    assert problems("data.train=null", source, "data.sources.a.weight=3", "evaluation.sets.b.path=reasoning-gym:maze") == ()
