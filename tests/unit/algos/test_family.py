"""Every algorithm's aggregated loss, its gradient and its advantages against formulas in plain float64 Python."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlx.algos.aggregation import loss_divisor, token_weight
from rlx.algos.mismatch import drift, importance_weights
from rlx.algos.overlong import overlong_penalty
from rlx.algos.prime import implicit_reward_loss, process_advantages, process_baselines
from rlx.algos.registry import ALGORITHMS, make_algorithm
from rlx.config.algorithm import AGGREGATIONS, PRESETS, AlgorithmConfig
from rlx.types.batch import LossInputs

Sequence = dict[str, Any]
CONSTANT = 17


def ragged(seed: int, spread: float = 0.4) -> list[Sequence]:
    """Responses of 0 to 9 tokens; the advantage is one number a token."""
    draw = random.Random(seed)
    sequences = []
    for length in [5, 0, 1, 9, 3, 0, 4]:
        new = [-3 * draw.random() for _ in range(length)]
        sequences.append(
            {
                "new": new,
                "old": [value + draw.gauss(0, spread) for value in new],
                "ref": [value + draw.gauss(0, 0.5) for value in new],
                "advantage": [draw.gauss(0, 2)] * length,
                "importance": [draw.uniform(0, 2) for _ in range(length)],
                "outcome": draw.choice([0.0, 1.0]),
            }
        )
    return sequences


def pack(sequences: list[Sequence], aggregation: str, importance: bool = False) -> LossInputs:
    """As the worker lays them out: a prompt token in front of each response, padding behind, junk off the response."""
    columns: dict[str, list[float]] = {key: [] for key in ("weights", "new", "old", "ref", "advantage", "importance", "outcome")}
    owner: list[int] = []
    for index, sequence in enumerate(sequences):
        length = len(sequence["new"])
        weight = token_weight(aggregation, length)
        columns["weights"] += [0.0] + [weight] * length + [0.0]
        for key in ("new", "old", "ref", "advantage", "importance"):
            columns[key] += [9.0 * index, *sequence[key], math.nan]
        columns["outcome"] += [sequence["outcome"]] * (length + 2)
        owner += [index] * (length + 2)
    tensors = {key: torch.tensor(values, dtype=torch.float64) for key, values in columns.items()}
    return LossInputs(
        weights_T=tensors["weights"],
        importance_T=tensors["importance"] if importance else None,
        sequence_T=torch.tensor(owner),
        num_sequences=len(sequences),
        logprobs_T=tensors["new"],
        entropy_T=torch.ones_like(tensors["new"]),
        old_logprobs_T=tensors["old"],
        ref_logprobs_T=tensors["ref"],
        advantages_T=tensors["advantage"],
        returns_T=tensors["outcome"],
    )


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def token_losses(config: AlgorithmConfig, sequence: Sequence) -> list[float]:
    """The token losses of one answer as the papers write them."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    logs = [new - old for new, old in zip(sequence["new"], sequence["old"], strict=True)]
    ratios = [math.exp(clip(value, -20, 20)) for value in logs]
    if config.name == "gspo" and logs:
        ratios = [math.exp(clip(statistics.fmean(logs), -20, 20))] * len(logs)
    losses = []
    for new, ratio, advantage in zip(sequence["new"], ratios, sequence["advantage"], strict=True):
        if config.name == "cispo":
            losses.append(-clip(ratio, low, high) * advantage * new)
            continue
        objective = min(ratio * advantage, clip(ratio, low, high) * advantage)
        if config.dual_clip is not None and advantage < 0 and config.name != "gspo":
            objective = max(objective, config.dual_clip * advantage)
        losses.append(-objective)
    return losses


def aggregate(aggregation: str, losses: list[list[float]]) -> float:
    """The four definitions."""
    full = [row for row in losses if row]
    if aggregation == "token-mean":
        return sum(map(sum, full)) / max(1, sum(map(len, full)))
    if aggregation == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in full) / max(1, len(full))
    total = sum(map(sum, full)) / max(1, len(full))
    return total if aggregation == "seq-mean-token-sum" else total / CONSTANT


def divided(config: AlgorithmConfig, sequences: list[Sequence], inputs: LossInputs) -> Tensor:
    counts = [len(sequence["new"]) for sequence in sequences if sequence["new"]]
    divisor = loss_divisor(config.loss_aggregation, sum(counts), len(counts), CONSTANT)
    return make_algorithm(config).policy_loss(inputs).loss / divisor


def batches() -> dict[str, list[Sequence]]:
    ordinary = ragged(1)
    return {
        "ragged": ordinary,
        "extreme ratios": ragged(2, spread=12.0),
        "beyond the clamp": ragged(3, spread=60.0),
        "all empty": [ordinary[1], ordinary[5]],
        "no advantage": [sequence | {"advantage": [0.0] * len(sequence["new"])} for sequence in ordinary],
        "one token": [ordinary[2]],
    }


@pytest.mark.parametrize("aggregation", [None, *AGGREGATIONS])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_loss_equals_the_papers(name: str, aggregation: str | None) -> None:
    config = AlgorithmConfig(name=name, loss_aggregation=aggregation)  # type: ignore[arg-type]
    for label, sequences in batches().items():
        for dual_clip in (None, 1.5):
            config = replace(config, dual_clip=dual_clip)
            wanted = aggregate(config.loss_aggregation, [token_losses(config, sequence) for sequence in sequences])
            found = divided(config, sequences, pack(sequences, config.loss_aggregation))
            assert float(found) == pytest.approx(wanted, rel=1e-9, abs=1e-12), (label, dual_clip)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_importance_weights_scale_the_policy_term_alone(name: str) -> None:
    config = AlgorithmConfig(name=name, entropy_coefficient=0.5)
    sequences = ragged(5)
    losses = [
        [loss * weight - 0.5 for loss, weight in zip(token_losses(config, sequence), sequence["importance"], strict=True)]
        for sequence in sequences
    ]
    found = divided(config, sequences, pack(sequences, config.loss_aggregation, importance=True))
    assert float(found) == pytest.approx(aggregate(config.loss_aggregation, losses), rel=1e-9)


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"cispo"}))
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    # Wide limits: the corners of the clipping have no derivative.
    config = AlgorithmConfig(
        name=name, clip_low=0.3, clip_high=0.3, kl_placement="loss", kl_coefficient=0.3, entropy_coefficient=0.1
    )
    sequences = ragged(7)
    inputs = pack(sequences, config.loss_aggregation)
    keep = inputs.weights_T != 0
    start = torch.where(keep, inputs.logprobs_T, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divided(config, sequences, replace(inputs, logprobs_T=x)), (start,))


def test_cispo_gradient_is_that_of_a_frozen_weight() -> None:
    config = AlgorithmConfig(name="cispo", clip_low=0.2, clip_high=0.3)
    sequences = ragged(8, spread=1.0)
    inputs = pack(sequences, config.loss_aggregation)
    inputs.logprobs_T.requires_grad_()
    make_algorithm(config).policy_loss(inputs).loss.backward()
    wanted = []
    for sequence in sequences:
        wanted.append(0.0)
        for new, old, advantage in zip(sequence["new"], sequence["old"], sequence["advantage"], strict=True):
            wanted.append(-clip(math.exp(new - old), 0.8, 1.3) * advantage)
        wanted.append(0.0)
    assert inputs.logprobs_T.grad.tolist() == pytest.approx(wanted, rel=1e-9)


def rewards_of(kind: str) -> tuple[list[float], list[bool]]:
    draw = random.Random(11)
    return {
        "ordinary": ([draw.gauss(0, 1) for _ in range(6)], [True] * 6),
        "some invalid": ([1.0, math.nan, 0.0, 0.5], [True, False, True, True]),
        "constant": ([0.1] * 5, [True] * 5),
        "pair": ([1.0, 0.0], [True, True]),
        "one left": ([1.0, 2.0], [True, False]),
        "huge": ([1e8, -1e8, 3.0], [True] * 3),
    }[kind]


def reference_advantage(config: AlgorithmConfig, counted: list[float], reward: float, baseline: float) -> float:
    if config.name == "remax":
        return reward - baseline
    if len(counted) < 2:
        return 0.0
    if config.name in ("rloo", "prime"):
        return reward - (math.fsum(counted) - reward) / (len(counted) - 1)
    centred = reward - statistics.fmean(counted)
    if config.normalize_by_std:
        return centred / (statistics.stdev(counted) + 1e-6) if len(set(counted)) > 1 else 0.0
    return centred


@pytest.mark.parametrize("kind", ["ordinary", "some invalid", "constant", "pair", "one left", "huge"])
@pytest.mark.parametrize("name", [n for n in sorted(ALGORITHMS) if make_algorithm(AlgorithmConfig(name=n)).group_advantages])
def test_group_advantages_equal_the_papers(name: str, kind: str) -> None:
    config = AlgorithmConfig(name=name)
    rewards, valid = rewards_of(kind)
    counted = [reward for reward, is_valid in zip(rewards, valid, strict=True) if is_valid]
    compare = make_algorithm(config).group_advantages
    assert compare is not None
    found = compare(rewards, valid, 0.3)
    for value, reward, is_valid in zip(found, rewards, valid, strict=True):
        wanted = reference_advantage(config, counted, reward, 0.3) if is_valid else 0.0
        assert value == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    if name == "remax":
        assert compare(rewards, valid, None) == [0.0] * len(rewards)


@pytest.mark.parametrize("correction", ["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"])
@pytest.mark.parametrize("limits", [(0.0, None), (0.9, 1.1), (0.0, 1.0001)])
def test_mismatch_weights_equal_their_definitions(correction: str, limits: tuple[float, float | None]) -> None:
    low, high = 0.8, 1.25
    config = AlgorithmConfig(
        mismatch_correction=correction,
        mismatch_low=low,
        mismatch_high=high,
        mismatch_reject_low=limits[0],
        mismatch_reject_high=limits[1],
    )
    for sequence in [*ragged(13, spread=0.2), *ragged(14, spread=40.0)]:
        logs = [new - old for new, old in zip(sequence["new"], sequence["old"], strict=True)]
        columns = [torch.tensor([9.0, *sequence[key], -9.0], dtype=torch.float64) for key in ("new", "old")]
        mask = torch.tensor([0.0, *[1.0] * len(logs), 0.0])
        found, stats = importance_weights(*columns, mask, config)
        clamped = [clip(value, -20, 20) for value in logs]
        raw = [math.exp(value) for value in clamped]
        if correction.startswith("sequence"):
            raw = [math.exp(clip(sum(clamped), -20, 20))] * len(logs)
        geometric = math.exp(sum(clamped) / max(1, len(logs)))
        wanted = []
        for ratio in raw:
            weight = 1.0
            if correction.endswith("truncate"):
                weight = min(ratio, high)
            if correction.endswith("mask"):
                weight = ratio if low <= ratio <= high else 0.0
            rejected = geometric < limits[0] or (limits[1] is not None and geometric > limits[1])
            wanted.append(0.0 if rejected else weight)
        assert found.tolist() == pytest.approx([1.0, *wanted, 1.0], rel=1e-9)
        assert stats["rejected_fraction"][1] == (1.0 if logs else 0.0)
        measures = drift(*columns, mask)
        if logs:
            assert float(measures["geometric_mean_ratio"][0]) == pytest.approx(geometric, rel=1e-9)
            assert float(measures["chi2"][0]) == pytest.approx(sum(math.exp(2 * v) - 1 for v in clamped), rel=1e-9)
        assert all(stat.isfinite().all() for stat in measures.values())


def test_overlong_penalty_ramps_over_the_buffer() -> None:
    found = [overlong_penalty(size, 20, 0.25, 2.0) for size in (0, 15, 16, 18, 20, 25)]
    assert found == pytest.approx([0, 0, -0.4, -1.2, -2, -2])
    assert overlong_penalty(20, 20, 0.0, 2.0) == 0.0


def test_prime_reward_model_loss_equals_its_cross_entropy() -> None:
    sequences, beta = ragged(17, spread=3.0), 0.7
    inputs = pack(sequences, "seq-mean-token-mean")
    total = 0.0
    for sequence in sequences:
        if sequence["new"]:
            logit = beta * sum(new - ref for new, ref in zip(sequence["new"], sequence["ref"], strict=True))
            probability = 1 / (1 + math.exp(-logit))
            total -= math.log(probability if sequence["outcome"] else 1 - probability)
    assert float(implicit_reward_loss(inputs, beta).loss) == pytest.approx(total, rel=1e-9)
    start = torch.where(inputs.weights_T != 0, inputs.logprobs_T, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: implicit_reward_loss(replace(inputs, logprobs_T=x), beta).loss, (start,))


def test_prime_advantages_equal_equation_five() -> None:
    draw, gamma = random.Random(19), 0.9
    rewards = [[draw.gauss(0, 1) for _ in range(length)] for length in (4, 1, 0, 6)]
    outcomes = [0.5, -0.25, 0.0, -0.25]
    means = [sum(row) / max(1, len(row)) for row in rewards]
    baselines = process_baselines(means)
    rows = [torch.tensor([0.0, *row, 0.0], dtype=torch.float64) for row in rewards]
    masks = [torch.tensor([0.0, *[1.0] * len(row), 0.0], dtype=torch.float64) for row in rewards]
    found = process_advantages(rows, masks, baselines, outcomes, gamma)
    for index, row in enumerate(rewards):
        others = [mean for other, mean in enumerate(means) if other != index]
        baseline = sum(others) / len(others)
        wanted = [
            sum(gamma ** (s - t) * (row[s] - baseline) for s in range(t, len(row))) + outcomes[index] for t in range(len(row))
        ]
        assert found[index].tolist() == pytest.approx([0.0, *wanted, 0.0], rel=1e-6)
    assert process_baselines([3.0]) == [0.0]


def test_settings_that_are_not_given_are_the_algorithms_own() -> None:
    assert AlgorithmConfig(name="gspo").clip_high == 4e-4
    assert AlgorithmConfig(name="gspo", clip_high=0.1).clip_high == 0.1
    assert AlgorithmConfig(name="dr_grpo").loss_aggregation == "constant"
    assert set(PRESETS) == set(ALGORITHMS)
