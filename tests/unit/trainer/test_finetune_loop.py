"""The fine-tuning driver on a fake model: who is called, in which order, with what; resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.config.schema import Config, DataConfig, EvaluationConfig, FinetuneConfig, ModelConfig, RunConfig
from rlx.data.examples import ExampleSource
from rlx.data.plan import Budget
from rlx.driver.finetune import Batches, FinetuneTrainer
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import UpdateStats
from rlx.types.train_batch import Rows, TrainBatch
from tests.parts import reader_of


class FakeModel:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.batches: list[TrainBatch] = []

    def load_batch(self, batch: Rows, plan: BatchPlan) -> None:
        self.calls.append("load_batch")
        self.batches.append(batch.rows(range(len(batch))))
        assert plan.mini_batches[0].num_sequences == len(batch)

    def score_reference(self) -> None:
        self.calls.append("score_reference")

    def update(self) -> UpdateStats:
        self.calls.append("update")
        return UpdateStats(grad_norm=2.0, learning_rate=0.1, skipped=False, means={"loss": 0.7, "accuracy": 0.5, "entropy": 1.0})

    def validate(self) -> Mapping[str, float]:
        self.calls.append("validate")
        return {"loss": 0.9, "accuracy": 0.25}

    def origin(self) -> Mapping[str, object]:
        return {}

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export_hf(self, path: str) -> None: ...


def make_trainer(
    folder: Path, objective: str = "dpo", seed: int = 0, examples_per_step: int = 3
) -> tuple[FinetuneTrainer, FakeModel]:
    path = folder / "pairs.jsonl"
    rows = [{"prompt": "a " * (index + 1), "response": "b", "chosen": "b", "rejected": "c"} for index in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "response": "", "rejected": "b"}]))
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate("abcd")}, unk_token="d"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="d")
    config = Config(
        model=ModelConfig(path="m"),
        data=DataConfig(train=str(path)),
        finetune=FinetuneConfig(objective=objective, examples_per_step=examples_per_step),
        evaluation=EvaluationConfig(every=2),
        run=RunConfig(seed=seed, steps=5),
    )
    source, model = ExampleSource(str(path), reader_of(config, tokenizer), seed), FakeModel()
    batches = Batches(model, ParallelDims(world_size=1), budget=Budget(max_tokens=8192), has_reference=config.has_reference)
    return FinetuneTrainer(batches, source, [], examples_per_step, seed), model


def test_a_step_reads_scores_and_updates_and_a_validation_learns_nothing(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path)
    metrics = [trainer.step() for _ in range(2)][1].metrics
    found = trainer.batches.validate(trainer.source.first(4), 2)
    step, held_out = ["load_batch", "score_reference", "update"], ["load_batch", "score_reference", "validate"]
    assert model.calls == step + step + held_out
    assert [len(batch) for batch in model.batches] == [6, 6, 8]
    assert metrics["loss/train"] == 0.7 and metrics["rewards/accuracy"] == 0.5 and metrics["policy/entropy"] == 1.0
    assert found["eval/loss"] == 0.9 and found["eval/accuracy"] == 0.25 and found["perf/validate_s"] >= 0
    assert metrics["drops/equal_sides"] == 1 and metrics["data/epochs"] == pytest.approx(6 / 7)


def test_supervised_fine_tuning_has_no_reference(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path, "sft")
    assert trainer.step().metrics["drops/empty_answer"] == 1
    assert model.calls == ["load_batch", "update"] and len(model.batches[0]) == 3


def test_resume_deals_what_would_have_come(tmp_path: Path) -> None:
    whole, expected = make_trainer(tmp_path)
    for _ in range(5):
        whole.step()
    first, _ = make_trainer(tmp_path)
    for _ in range(3):
        first.step()
    second, model = make_trainer(tmp_path)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.num_steps_done == 3
    second.step()
    again, first_time = model.batches[0], expected.batches[3]
    assert np.array_equal(again.token_ids, first_time.token_ids) and np.array_equal(again.offsets, first_time.offsets)
    assert np.array_equal(again.loss_mask, first_time.loss_mask) and len(again) == 6
    with pytest.raises(ValueError, match=r"run\.seed=1"):
        make_trainer(tmp_path, seed=1)[0].load_state(first.state())


def test_another_batch_size_is_followed_from_the_same_place(tmp_path: Path) -> None:
    expected, _ = make_trainer(tmp_path)
    order = expected.source.next(13)
    first, _ = make_trainer(tmp_path)
    first.step()
    second, model = make_trainer(tmp_path, examples_per_step=5)
    second.load_state(json.loads(json.dumps(first.state())))
    second.step()
    dealt = [list(sample.token_ids) for sample in model.batches[0]]
    assert dealt == [list(side.token_ids) for example in order[3:8] for side in example]
