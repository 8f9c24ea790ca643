"""A whole iteration of the driver on in-process fakes: who is called, in which order, with what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rlx.algos.kl_controller import make_kl_controller
from rlx.algos.registry import make_algorithm
from rlx.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
)
from rlx.config.sources import SourceConfig
from rlx.data.plan import Budget
from rlx.driver.batcher import Batcher, BatchRules
from rlx.driver.checkpoint import read_driver_state, whole_checkpoints, write_checkpoint
from rlx.driver.groups import GroupStream
from rlx.driver.ppo import Learner, PPOTrainer
from rlx.driver.roles import Roles
from rlx.driver.run import evaluate_alone, run
from rlx.obs.log import logger
from rlx.obs.metrics import read_metrics
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import FinishReason, Prompt, Reward, RolloutGroup, SamplingSpec, UpdateStats
from rlx.types.train_batch import Rows, TrainSample
from rlx.types.weights import WeightManifest
from tests.trajectories import answered, conversation


@dataclass
class Calls:
    """What happened, in order."""

    names: list[str] = field(default_factory=list)
    samples: list[TrainSample] = field(default_factory=list)
    plan: BatchPlan | None = None


class FakePolicy:
    def __init__(self, calls: Calls, kl: float | None = None) -> None:
        self.calls, self.kl = calls, kl

    def begin_training(self) -> None: ...

    def load_batch(self, batch: Rows, plan: BatchPlan) -> None:
        self.calls.names.append("load_batch")
        self.calls.samples, self.calls.plan = list(batch.rows(range(len(batch)))), plan

    def score(self) -> Mapping[str, float]:
        self.calls.names.append("score policy")
        return {"policy/entropy": 1.5} | ({} if self.kl is None else {"kl/ref": self.kl})

    def compute_advantages(self, kl_coefficient: float) -> Mapping[str, float]:
        self.calls.names.append(f"advantages {kl_coefficient}")
        return {}

    def update(self, mini_batch: int) -> UpdateStats:
        self.calls.names.append(f"update policy {mini_batch}")
        return UpdateStats(grad_norm=2.0 + mini_batch, learning_rate=0.1, skipped=mini_batch == 1, means={"policy": -0.5})

    def publish(self, version: int) -> WeightManifest | None:
        self.calls.names.append(f"publish {version}")
        return WeightManifest(version=version, tensors=(), num_bytes=7, seconds=0.5)

    def origin(self) -> Mapping[str, object]:
        return {}

    def save(self, path: str) -> None:
        (Path(path) / "weights").write_text("w")

    def load(self, path: str) -> None: ...

    def export_hf(self, path: str) -> None: ...


class FakeCritic:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def score(self) -> Mapping[str, float]:
        self.calls.names.append("score critic")
        return {}

    def update(self, mini_batch: int) -> UpdateStats:
        self.calls.names.append(f"update critic {mini_batch}")
        return UpdateStats(grad_norm=1.0, learning_rate=0.2, skipped=False, means={"value": 0.25})


class FakeReference:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def score(self) -> Mapping[str, float]:
        self.calls.names.append("score reference")
        return {}


class FakeRollout:
    """Answers in the reverse order of the prompts; the second answer of each is empty, the third cannot be judged."""

    finish_reasons: tuple[FinishReason, ...] = ("stop",) * 4

    def begin_step(self, step: int) -> None:
        self.step = step

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        for prompt in reversed(prompts):
            answers = [(5, 6), (), (7,), (8, 9, 1)]
            trajectories = tuple(
                answered(prompt.token_ids, ids, finish_reason=reason, versions=(self.step,) * len(ids))
                for ids, reason in zip(answers[: sampling.num_samples], self.finish_reasons, strict=False)
            )
            yield RolloutGroup(prompt=prompt, trajectories=trajectories)

    def close(self) -> None: ...


class FakeReward:
    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        for group in groups:
            rewards = (
                Reward(value=1.0, parts={"right": 1.0}),
                Reward(value=0.0),
                Reward(value=9.0, valid=False, error="OSError:\nno database"),
                Reward(value=0.0),
            )
            yield replace(group, rewards=rewards[: len(group.trajectories)])

    def close(self) -> None: ...


class FakePrompts:
    def __init__(self) -> None:
        self.num_drawn = 0

    def next(self, num: int) -> list[Prompt]:
        ids = range(self.num_drawn, self.num_drawn + num)
        self.num_drawn += num
        return [Prompt(prompt_id=index, token_ids=(1, 2, 3), text="?", source="ab"[index % 2]) for index in ids]

    def state(self) -> dict[str, int]:
        return {"num_drawn": self.num_drawn}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.num_drawn = state["num_drawn"]

    def metrics(self) -> dict[str, float]:
        return {"data/epoch": self.num_drawn / 100}


def make_config(**algorithm: Any) -> Config:
    return Config(
        run=RunConfig(seed=4, max_empty_steps=3),
        model=ModelConfig(path="none"),
        data=DataConfig(train="none", prompts_per_step=3),
        reward=RewardConfig(name="exact"),
        algorithm=AlgorithmConfig(**algorithm),
    )


def make_trainer(calls: Calls, kl: float | None = None, config: Config | None = None, **algorithm: Any) -> PPOTrainer:
    config = config or make_config(**algorithm)
    rule = make_algorithm(config.algorithm)
    roles = Roles(
        policy=FakePolicy(calls, kl),
        critic=FakeCritic(calls) if rule.needs_critic else None,
        reference=FakeReference(calls) if config.algorithm.needs_reference else None,
        rollout=FakeRollout(),
        reward=FakeReward(),
    )
    sampling = SamplingSpec(max_new_tokens=4, num_samples=4)
    prompts: Any = FakePrompts()
    stream = GroupStream(prompts, roles.rollout, roles.reward, sampling, greedy_baseline=rule.greedy_baseline)
    controller = make_kl_controller(config.algorithm)
    learner = Learner(config.algorithm, Budget(max_tokens=12), ParallelDims(world_size=2), roles, controller)
    rules = BatchRules(
        prompts_per_step=config.data.prompts_per_step,
        max_new_tokens=config.rollout.max_new_tokens,
        algorithm=config.algorithm,
        group_advantages=rule.group_advantages,
        sources=frozenset(config.data.sources),
    )
    return PPOTrainer(config.run, roles, stream, Batcher(rules), learner)


def test_ppo_step_calls_everyone_in_order() -> None:
    calls = Calls()
    trainer = make_trainer(calls, kl_placement="reward", kl_coefficient=0.3, epochs=2, num_mini_batches=2)
    report = trainer.step()
    updates = ["update critic 0", "update policy 0", "update critic 1", "update policy 1"] * 2
    scores = ["score reference", "score policy", "score critic", "advantages 0.3"]
    assert calls.names == ["load_batch", *scores, *updates, "publish 1"]
    assert report.metrics["policy/grad_norm"] == pytest.approx(2.5)
    assert report.metrics["policy/skipped_steps"] == 2
    assert report.metrics["loss/value"] == pytest.approx(0.25)
    assert report.metrics["kl/coefficient"] == 0.3


def test_what_a_run_does_not_have_is_not_reported() -> None:
    metrics = make_trainer(Calls(), name="grpo").step().metrics
    assert not {"kl/ref", "kl/coefficient", "loss/value", "critic/grad_norm"} & set(metrics)


def test_answers_that_were_cut_off_are_counted() -> None:
    trainer = make_trainer(Calls(), name="grpo")
    assert trainer.step().metrics["response/cut_off_share"] == 0.0
    trainer.roles.rollout.finish_reasons = ("stop", "stop", "stop", "length")  # type: ignore[attr-defined]
    assert trainer.step().metrics["response/cut_off_share"] == 0.25


def test_the_length_of_an_answer_is_what_was_sampled_in_all_its_turns() -> None:
    trainer = make_trainer(Calls(), name="grpo")
    turns = conversation((1, 2, 3), (5, 6), (40,) * 3, (7,), (41,))

    def generate(prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        for prompt in prompts:
            yield RolloutGroup(prompt=prompt, trajectories=(turns,) * 4)

    trainer.roles.rollout.generate = generate  # type: ignore[method-assign]
    assert trainer.step().metrics["response/tokens_mean"] == 3.0


def test_batch_is_in_prompt_order_and_drops_are_counted() -> None:
    calls = Calls()
    metrics = make_trainer(calls, name="grpo").step().metrics
    assert [sample.group_id for sample in calls.samples] == [0, 0, 1, 1, 2, 2]
    assert (metrics["drops/empty_response"], metrics["drops/invalid_reward"]) == (3, 3)
    # The invalid verdict's 9.0 counts nowhere.
    assert metrics["reward/mean"] == pytest.approx(1 / 3)
    assert metrics["reward/right"] == 1.0
    assert calls.plan is not None and calls.plan.mini_batches[0].num_loss_tokens == 3 * (2 + 3)


@pytest.mark.parametrize(("algorithm", "counted"), [({"name": "grpo"}, "3 of 12"), ({"name": "remax"}, "3 of 15")])
def test_failing_verifiers_are_said_once_a_step(
    algorithm: dict[str, str], counted: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO", logger="rlx"):
        trainer = make_trainer(Calls(), **algorithm)
        rows = [trainer.step().metrics for _ in range(2)]
    said = [record.getMessage() for record in caplog.records if "NOTICE" in record.getMessage()]
    what = f"the verifier failed on {counted} answers, which are left out; the first: OSError: no database"
    assert said == [f"NOTICE warning: step {step}: {what}" for step in (1, 2)]
    assert [row["reward/invalid"] for row in rows] == [3, 3]


def test_group_advantages_rank_the_right_answer_first() -> None:
    calls = Calls()
    make_trainer(calls, name="grpo").step()
    first, second = calls.samples[:2]
    assert first.scalar_advantage is not None and second.scalar_advantage is not None
    assert first.scalar_advantage > 0 > second.scalar_advantage


def test_adaptive_kl_moves_after_the_step_that_showed_it() -> None:
    calls = Calls()
    options: dict[str, Any] = {"kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 10.0}
    trainer = make_trainer(calls, kl=5.0, kl_placement="reward", kl_coefficient=0.3, **options)
    report = trainer.step()
    assert report.metrics["kl/coefficient"] == 0.3
    assert trainer.learner.controller.coefficient > 0.3


class FakeJob:
    """A trainer's steps on fakes; notes when it began and what was evaluated."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self.models = trainer.roles.policy
        self.step, self.state, self.load_state = trainer.step, trainer.state, trainer.load_state
        self.calls: list[Any] = []

    @property
    def num_steps_done(self) -> int:
        return self.trainer.num_steps_done

    def begin(self) -> None:
        self.calls.append("begin")

    def evaluate(self, step: int) -> dict[str, float]:
        self.calls.append(step)
        return {"eval/reward_mean": 0.5}

    def counts(self) -> dict[str, float]:
        return {"memory/x": 1.0}


def config_of(tmp_path: Path, steps: int, checkpoint: CheckpointConfig, evaluation: EvaluationConfig | None = None) -> Config:
    run = RunConfig(dir=str(tmp_path), seed=4, steps=steps, export_hf=False, resume="auto")
    return replace(make_config(), run=run, checkpoint=checkpoint, evaluation=evaluation or EvaluationConfig(every=0))


def test_state_resumes_where_it_stopped(tmp_path: Path) -> None:
    trainer = make_trainer(Calls())
    config = config_of(tmp_path, 5, CheckpointConfig(every=2, keep=2))
    assert run(config, FakeJob(trainer))
    assert [step for step, _ in whole_checkpoints(config.checkpoints)] == [4, 5]
    again = make_trainer(Calls())
    again.load_state(read_driver_state(whole_checkpoints(config.checkpoints)[-1][1]))
    assert again.num_steps_done == 5
    assert again.stream.state() == trainer.stream.state()
    assert [row.step for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_asked_to_stop_it_ends_the_step_saves_and_returns(tmp_path: Path) -> None:
    trainer = make_trainer(Calls())
    config = config_of(tmp_path, 5, CheckpointConfig(at_end=False))
    assert not run(config, FakeJob(trainer), stop_asked=lambda: trainer.num_steps_done == 2)
    assert trainer.num_steps_done == 2 and [step for step, _ in whole_checkpoints(config.checkpoints)] == [2]
    trainer = make_trainer(Calls())
    assert run(config, FakeJob(trainer))  # goes on; what is whole is not saved again
    assert [row.step for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in whole_checkpoints(config.checkpoints)] == [2]


def test_another_seed_is_refused_on_resume() -> None:
    trainer = make_trainer(Calls())
    with pytest.raises(ValueError, match=r"run\.seed=4.*made with 5"):
        trainer.load_state({**trainer.state(), "seed": 5})


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path) -> None:
    def fail(folder: str) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 3, {}, fail, keep=1)
    assert whole_checkpoints(tmp_path) == []
    write_checkpoint(tmp_path, 3, {"step": 3}, lambda folder: None, keep=1)
    assert [step for step, _ in whole_checkpoints(tmp_path)] == [3]
    assert not (whole_checkpoints(tmp_path)[0][1] / "half").exists()


def test_a_mixture_reports_the_reward_of_each_source() -> None:
    trainer = make_trainer(Calls())
    assert not [name for name in trainer.step().metrics if name.startswith("reward/mean/")]
    sources = {name: SourceConfig(path="none") for name in "abc"}
    config = replace(make_config(), data=DataConfig(sources=sources, prompts_per_step=3))
    trainer = make_trainer(Calls(), config=config)
    assert trainer.step().metrics["data/epoch"] == 0.03
    metrics = trainer.step().metrics
    found = {name: value for name, value in metrics.items() if name.startswith("reward/mean/")}
    assert found == {"reward/mean/a": pytest.approx(1 / 3), "reward/mean/b": pytest.approx(1 / 3)}
    assert metrics["data/epoch"] == 0.06


def test_evaluation_before_the_first_step_is_step_0_and_seconds_of_saving_are_told(tmp_path: Path) -> None:
    job = FakeJob(make_trainer(Calls()))
    evaluation = EvaluationConfig(at_start=True, every=2)
    config = config_of(tmp_path, 4, CheckpointConfig(every=2, at_end=False), evaluation)
    config = replace(config, run=replace(config.run, resume="never"))
    # A run that died before its first checkpoint left this row; it begins anew.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/reward_mean": 0.25}\n{"step": 1}\n')
    assert run(config, job)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert job.calls == ["begin", 0, 2, 4] and [row.step for row in rows] == [0, 1, 2, 3, 4]
    assert [row.step for row in rows if "eval/reward_mean" in row.metrics] == [0, 2, 4]
    assert all(row.metrics["memory/x"] == 1.0 for row in rows)
    assert [row.step for row in rows if "perf/save_s" in row.metrics] == [3]
    due = [step for step in range(6) if config.evaluation.is_due(step, 5)]
    assert due == [0, 2, 4, 5] and not EvaluationConfig().is_due(0, 5)


def test_an_evaluation_alone_is_of_the_newest_checkpoint_where_asked(tmp_path: Path) -> None:
    """Each appends its row, also of a step that was measured before."""
    base = make_config()
    loaded: list[str] = []
    policy = FakePolicy(Calls())
    policy.load = loaded.append  # type: ignore[method-assign]
    for step in (3, 12):
        write_checkpoint(tmp_path / "checkpoints", step, {"step": step, "seed": 0, "prompts": {}}, lambda folder: None, keep=9)
    for resume in ("never", "auto", "never"):
        run = RunConfig(dir=str(tmp_path / "eval"), resume=resume)
        config = replace(base, run=run, evaluation=EvaluationConfig(only=True))
        evaluate_alone(config, policy, lambda step: {"eval/reward_mean": float(step)})
    rows = [(row.step, row.metrics["eval/reward_mean"]) for row in read_metrics(tmp_path / "eval" / "metrics.jsonl")]
    assert rows == [(0, 0.0), (12, 12.0), (0, 0.0)]
    assert loaded == [str(tmp_path / "checkpoints" / "step-00000012")]
