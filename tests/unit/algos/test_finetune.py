"""Fine-tuning losses against formulas written out here in float64, and against TRL's as published."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlx.algos.dpo import dpo_loss, ipo_loss
from rlx.algos.reward_model import reward_model_loss
from rlx.algos.sft import sft_loss
from rlx.types.batch import LossInputs, LossOutput

BETA = 0.25
Loss = Callable[[LossInputs], LossOutput]
LOSSES: dict[str, Loss] = {
    "dpo": lambda inputs: dpo_loss(inputs, BETA),
    "dpo, smoothed": lambda inputs: dpo_loss(inputs, BETA, 0.2),
    "ipo": lambda inputs: ipo_loss(inputs, BETA),
    "rm": reward_model_loss,
    "rm, centred": lambda inputs: reward_model_loss(inputs, 0.3),
}


def make_inputs(lengths: list[tuple[int, int]], seed: int = 0, weight: float = 1.0, scale: float = 1.0) -> LossInputs:
    """Sequences of (prompt, answer) tokens in float64, each weighing ``weight``: answers by their tokens, with a value and
    log-probs at every token. Sequences without answer tokens weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    sequence, weights = [], []
    for index, (prompt, answer) in enumerate(lengths):
        sequence += [index] * (prompt + answer)
        weights += [0.0] * prompt + [weight / answer] * answer
    num_tokens = len(sequence)

    def draw() -> Tensor:
        return scale * torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    return LossInputs(
        weights_T=torch.tensor(weights, dtype=torch.float64),
        sequence_T=torch.tensor(sequence),
        num_sequences=len(lengths),
        logprobs_T=-draw().abs(),
        ref_logprobs_T=-draw().abs(),
        entropy_T=draw().abs(),
        values_T=draw(),
    )


def at_last_token(inputs: LossInputs) -> LossInputs:
    """A reward model's weights: 1 at the last token of each sequence."""
    sequence = inputs.sequence_T
    assert sequence is not None
    last = torch.cat([sequence[1:] != sequence[:-1], torch.tensor([True])])
    return replace(inputs, weights_T=last.double())


def inputs_of(name: str, lengths: list[tuple[int, int]], **more: float) -> LossInputs:
    inputs = make_inputs(lengths, **more)  # type: ignore[arg-type]
    return at_last_token(inputs) if name.startswith("rm") else inputs


RAGGED = [(3, 5), (3, 1), (1, 1), (1, 7), (4, 2), (4, 2), (0, 3), (0, 9)]


def by_sequence(values: Tensor, inputs: LossInputs) -> list[list[float]]:
    """The values of the weighted tokens, sequence by sequence."""
    assert inputs.sequence_T is not None
    rows: list[list[float]] = [[] for _ in range(inputs.num_sequences)]
    for value, weight, sequence in zip(values.tolist(), inputs.weights_T.tolist(), inputs.sequence_T.tolist(), strict=True):
        if weight:
            rows[sequence].append(value)
    return rows


def reference_loss(name: str, inputs: LossInputs) -> float:
    """The sum over pairs, in plain Python."""
    assert inputs.logprobs_T is not None and inputs.ref_logprobs_T is not None and inputs.values_T is not None
    if name.startswith("rm"):
        scores = [sum(row) for row in by_sequence(inputs.values_T, inputs)]
    else:
        rows = by_sequence(inputs.logprobs_T - inputs.ref_logprobs_T, inputs)
        scores = [sum(row) / (len(row) if name == "ipo" else 1) for row in rows]
    total = 0.0
    for chosen, rejected in zip(scores[::2], scores[1::2], strict=True):
        h = chosen - rejected
        if name == "ipo":
            total += (h - 1 / (2 * BETA)) ** 2
        elif name.startswith("rm"):
            total += math.log1p(math.exp(-h)) + (0.3 if "centred" in name else 0.0) * (chosen + rejected) ** 2
        else:
            smoothing = 0.2 if "smoothed" in name else 0.0
            total += (1 - smoothing) * math.log1p(math.exp(-BETA * h)) + smoothing * math.log1p(math.exp(BETA * h))
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_equal_the_formula(name: str, seed: int) -> None:
    inputs = inputs_of(name, RAGGED, seed=seed)
    assert float(LOSSES[name](inputs).loss) == pytest.approx(reference_loss(name, inputs), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_preference_losses_equal_trls(seed: int) -> None:
    """``DPOTrainer.dpo_loss`` (sigmoid and ipo, whose log-probs TRL averages) and ``RewardTrainer.compute_loss``."""
    inputs = make_inputs(RAGGED, seed=seed)
    assert inputs.logprobs_T is not None and inputs.ref_logprobs_T is not None
    policy = torch.tensor([sum(row) for row in by_sequence(inputs.logprobs_T, inputs)], dtype=torch.float64)
    reference = torch.tensor([sum(row) for row in by_sequence(inputs.ref_logprobs_T, inputs)], dtype=torch.float64)
    counts = torch.tensor([answer for _, answer in RAGGED])
    logits = (policy[::2] - policy[1::2]) - (reference[::2] - reference[1::2])
    losses = -F.logsigmoid(BETA * logits) * (1 - 0.2) - F.logsigmoid(-BETA * logits) * 0.2
    assert float(dpo_loss(inputs, BETA, 0.2).loss) == pytest.approx(float(losses.sum()), rel=1e-9)

    policy, reference = policy / counts, reference / counts
    logits = (policy[::2] - policy[1::2]) - (reference[::2] - reference[1::2])
    assert float(ipo_loss(inputs, BETA).loss) == pytest.approx(float(((logits - 1 / (2 * BETA)) ** 2).sum()), rel=1e-9)

    inputs = at_last_token(inputs)
    assert inputs.values_T is not None
    rewards = torch.tensor([row[0] for row in by_sequence(inputs.values_T, inputs)], dtype=torch.float64)
    chosen, rejected = rewards[::2], rewards[1::2]
    loss = -F.logsigmoid(chosen - rejected).mean() + 0.3 * torch.mean((chosen + rejected) ** 2)
    assert float(reward_model_loss(inputs, 0.3).loss) / len(chosen) == pytest.approx(float(loss), rel=1e-9)


def test_sft_loss_is_the_cross_entropy_of_the_answers() -> None:
    inputs = make_inputs(RAGGED, seed=3)
    inputs = replace(inputs, weights_T=(inputs.weights_T != 0).double())
    assert inputs.logprobs_T is not None and inputs.entropy_T is not None
    keep = inputs.weights_T != 0
    output = sft_loss(inputs)
    assert float(output.loss) == pytest.approx(-float(inputs.logprobs_T[keep].sum()), rel=1e-12)
    assert output.stats["loss"].tolist() == pytest.approx([float(output.loss), float(keep.sum())])
    assert output.stats["entropy"][0] == pytest.approx(float(inputs.entropy_T[keep].sum()))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = inputs_of(name, RAGGED[:6], seed=5)
    column = "values_T" if name.startswith("rm") else "logprobs_T"

    def loss(values_T: Tensor) -> Tensor:
        return LOSSES[name](replace(inputs, **{column: values_T})).loss

    assert torch.autograd.gradcheck(loss, (getattr(inputs, column).requires_grad_(),))


def test_sft_gradient_is_that_of_finite_differences() -> None:
    inputs = make_inputs(RAGGED[:4], seed=6)
    assert inputs.logprobs_T is not None
    assert torch.autograd.gradcheck(
        lambda values_T: sft_loss(replace(inputs, logprobs_T=values_T)).loss, (inputs.logprobs_T.requires_grad_(),)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_that_share_sequences_add_up(name: str) -> None:
    """Context parallelism: each rank has some tokens of every sequence and knows the sums over all ranks."""
    inputs = inputs_of(name, RAGGED, seed=8)
    whole = LOSSES[name](inputs)
    num_tokens = inputs.weights_T.numel()
    parts = [torch.arange(num_tokens)[torch.arange(num_tokens) % 3 == rank] for rank in range(3)]
    sums: list[Tensor] = []

    def cut(index: Tensor) -> LossInputs:
        names = ("weights_T", "sequence_T", "logprobs_T", "ref_logprobs_T", "values_T")
        return replace(inputs, **{name: getattr(inputs, name)[index] for name in names})

    def note(index: Tensor) -> None:
        def keep(local: Tensor) -> Tensor:
            found.append(local)
            return local

        found: list[Tensor] = []
        LOSSES[name](replace(cut(index), sum_over_ranks=keep))
        sums.append(torch.stack(found))

    for index in parts:
        note(index)
    totals = torch.stack(sums).sum(0)

    def run(index: Tensor) -> LossOutput:
        queue = iter(totals)
        return LOSSES[name](replace(cut(index), sum_over_ranks=lambda local: next(queue)))

    outputs = [run(index) for index in parts]
    assert float(sum(output.loss for output in outputs)) == pytest.approx(float(whole.loss), rel=1e-9)
    for key, stat in whole.stats.items():
        assert torch.allclose(torch.stack([output.stats[key] for output in outputs]).sum(0), stat, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_scale_the_loss_and_leave_the_statistics(name: str) -> None:
    inputs = inputs_of(name, RAGGED, seed=9)
    once, thrice = LOSSES[name](inputs), LOSSES[name](replace(inputs, weights_T=3 * inputs.weights_T))
    assert float(thrice.loss) == pytest.approx(3 * float(once.loss), rel=1e-12)
    for key, stat in once.stats.items():
        assert float(thrice.stats[key][0] / thrice.stats[key][1]) == pytest.approx(float(stat[0] / stat[1]), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_statistics_say_what_they_are_named(name: str) -> None:
    inputs = inputs_of(name, RAGGED, seed=10)
    stats = {key: float(stat[0] / stat[1]) for key, stat in LOSSES[name](inputs).stats.items()}
    assert stats["loss"] == pytest.approx(reference_loss(name, inputs) / 4, rel=1e-9)
    assert stats["margin"] == pytest.approx(stats["chosen"] - stats["rejected"], rel=1e-9)
    assert any(stats["accuracy"] == pytest.approx(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0))


@pytest.mark.parametrize("name", ["sft", *LOSSES])
def test_a_padding_sequence_gives_zero_with_a_gradient(name: str) -> None:
    """A rank without samples runs one masked sequence, whose columns may hold anything."""
    loss = sft_loss if name == "sft" else LOSSES[name]
    nan = torch.full((2,), math.nan, dtype=torch.float64)
    values, logprobs = nan.clone().requires_grad_(), nan.clone().requires_grad_()
    inputs = LossInputs(
        weights_T=torch.zeros(2, dtype=torch.float64),
        sequence_T=torch.zeros(2, dtype=torch.int64),
        num_sequences=1,
        logprobs_T=logprobs,
        ref_logprobs_T=nan,
        values_T=values,
    )
    output = loss(inputs)
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert all(stat.tolist() == [0.0, 0.0] for stat in output.stats.values())
    assert all(column.grad is None or not column.grad.any() for column in (values, logprobs))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_stay_finite(name: str) -> None:
    inputs = inputs_of(name, RAGGED, seed=11, scale=1e4)
    column = inputs.values_T if name.startswith("rm") else inputs.logprobs_T
    assert column is not None
    column.requires_grad_()
    output = LOSSES[name](inputs)
    output.loss.backward()
    assert output.loss.isfinite() and column.grad is not None and column.grad.isfinite().all()


def test_equal_sides_teach_nothing() -> None:
    inputs = make_inputs([(2, 3), (2, 3)], seed=12)
    same = {name: torch.cat([getattr(inputs, name)[:5]] * 2) for name in ("logprobs_T", "ref_logprobs_T", "values_T")}
    inputs = replace(inputs, **same)
    output = dpo_loss(inputs, BETA)
    assert float(output.loss) == pytest.approx(math.log(2))
    assert output.stats["accuracy"][0] == 0 and output.stats["margin"][0] == 0


def test_errors_name_the_missing_column() -> None:
    inputs = make_inputs(RAGGED)
    for name, loss in (("ref_logprobs_T", LOSSES["dpo"]), ("values_T", LOSSES["rm"]), ("logprobs_T", sft_loss)):
        with pytest.raises(ValueError, match=name):
            loss(replace(inputs, **{name: None}))
    with pytest.raises(ValueError, match="sequence_T"):
        dpo_loss(replace(inputs, sequence_T=None), BETA)
