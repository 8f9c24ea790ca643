"""What a loss is handed of a batch, what a model without an optimizer refuses, and what a dtype stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlx.config.schema import Config, DataConfig, ModelConfig, RolloutConfig
from rlx.data.collate import collate
from rlx.parallel.packing import local_batch
from rlx.trainer.batch import of_sample
from rlx.trainer.losses import policy_loss, process_loss, value_loss
from rlx.trainer.rank_model import RankModel
from rlx.types.batch import Columns, LossInputs, LossOutput
from rlx.types.layout import ParallelDims
from rlx.types.precision import BF16, FP32, precision_of
from tests.batches import train_sample

CONTEXT: Any = SimpleNamespace(device=torch.device("cpu"), dims=ParallelDims(world_size=1), cp_rank=0)
SAMPLE = train_sample(sample_id=4, token_ids=(7, 8, 9), loss_mask=(0, 1, 1), rollout_logprobs=(0.0, -1.0, -1.0), reward=1.0)
NAMES = [
    "weights",
    "sequence_weights",
    "outcomes",
    "old_logprobs",
    "entropy",
    "ref_logprobs",
    "process_logprobs",
    "values",
    "advantages",
    "returns",
    "importance",
]


class Looks:
    """A loss that keeps what it is handed."""

    def __init__(self) -> None:
        self.inputs: list[LossInputs] = []

    def __call__(self, inputs: LossInputs) -> LossOutput:
        self.inputs.append(inputs)
        return LossOutput(loss=torch.zeros(()), stats={})

    @property
    def seen(self) -> dict[str, float]:
        """The first number of every tensor that is data."""
        (inputs,) = self.inputs
        found = {name: getattr(inputs, f"{name}_T") for name in ("weights", "importance", "old_logprobs", "ref_logprobs")}
        found |= {name: getattr(inputs, f"{name}_T") for name in ("advantages", "old_values", "returns")}
        return {name: float(value[0]) for name, value in found.items() if value is not None}


def batch_of(columns: Columns[Tensor]) -> Any:
    """One sample, each of its columns the same number all along."""
    return local_batch(collate([SAMPLE], [4], CONTEXT.dims, columns.map(lambda _, values: {4: values})), CONTEXT)


EVERY: Columns[Tensor] = Columns(**{name: torch.full((3,), float(number)) for number, name in enumerate(NAMES, 1)})


def test_each_loss_is_handed_its_own_columns() -> None:
    batch, group = batch_of(EVERY), Any
    assert [name for name, _ in EVERY.present()] == NAMES
    policy, process, value = Looks(), Looks(), Looks()
    policy_loss(policy, group)(torch.zeros(2, 3), batch)  # type: ignore[arg-type]
    process_loss(process, group)(torch.zeros(2, 3), batch)  # type: ignore[arg-type]
    value_loss(value)(torch.zeros(3), batch)
    assert policy.seen == {"weights": 1, "importance": 11, "old_logprobs": 4, "ref_logprobs": 6, "advantages": 9}
    assert process.seen == {"weights": 2, "ref_logprobs": 6, "returns": 3}
    assert value.seen == {"weights": 1, "old_values": 8, "returns": 10}  # the mask: the first position predicts a response token


def test_columns_that_are_not_there_are_none_for_the_loss() -> None:
    looks = Looks()
    policy_loss(looks, Any)(torch.zeros(2, 3), batch_of(Columns(weights=torch.ones(3))))  # type: ignore[arg-type]
    assert looks.seen == {"weights": 1}
    with pytest.raises(AssertionError, match="load_batch adds the weights"):
        policy_loss(looks, Any)(torch.zeros(2, 3), batch_of(Columns()))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="not been computed"):
        of_sample(None, SAMPLE)


def test_a_model_that_is_only_read_refuses_an_update() -> None:
    nothing: Any = None
    model = RankModel(arch=nothing, chunks=[], head=nothing, context=nothing, companions=nothing)
    with pytest.raises(AssertionError, match="only read"):
        model.update(nothing, 0)


@pytest.mark.parametrize(
    ("trainers", "engines", "expected"), [("bf16", "auto", BF16), ("bf16", "fp32", FP32), ("fp32", "bf16", BF16)]
)
def test_engines_have_the_trainers_precision_unless_told(trainers: str, engines: str, expected: object) -> None:
    config = Config(model=ModelConfig(path="m", dtype=trainers), data=DataConfig(train="d"), rollout=RolloutConfig(dtype=engines))
    assert config.engine_precision == expected and config.model.precision.name == trainers


def test_an_fp32_head_is_one_of_narrower_models() -> None:
    assert precision_of("bf16", fp32_head=True).fp32_head and precision_of("fp32", fp32_head=True) == FP32
    assert (FP32.torch_name, BF16.torch_name) == ("float32", "bfloat16")
    assert (FP32.weight_bytes + FP32.optimizer_bytes, BF16.weight_bytes + BF16.optimizer_bytes) == (12, 14)
