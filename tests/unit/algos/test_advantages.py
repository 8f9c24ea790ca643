"""GAE, whitening, group-relative advantages and the KL controller against formulas written out here in float64."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from rlx.algos.gae import gae_packed, gae_ragged
from rlx.algos.grpo import group_relative_advantages
from rlx.algos.kl_controller import make_kl_controller
from rlx.algos.ppo import token_rewards
from rlx.algos.whitening import whiten
from rlx.config.schema import AlgorithmConfig


def reference_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: advantage_t = sum_k (gamma lam)^k delta_{t+k}."""
    bootstrapped = [*values, 0.0]
    deltas = [rewards[t] + gamma * bootstrapped[t + 1] - values[t] for t in range(len(rewards))]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def ragged_batch(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Prompts of 1 to 5, responses of 0 to 9 tokens; noise off the mask."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rewards, values, masks = [], [], []
    for _ in range(draw.randint(1, 12)):
        before, inside, after = draw.randint(1, 5), draw.choice([0, 1, 3, 9]), 1
        mask = torch.tensor([0.0] * before + [1.0] * inside + [0.0] * after)
        rewards.append(torch.randn(len(mask), generator=generator))
        values.append(torch.randn(len(mask), generator=generator))
        masks.append(mask)
    return rewards, values, masks


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_equals_its_definition_on_ragged_batches(seed: int, gamma: float, lam: float) -> None:
    rewards, values, masks = ragged_batch(seed)
    advantages, returns = gae_ragged(rewards, values, masks, gamma, lam)
    for reward_L, value_L, mask_L, advantage_L, return_L in zip(rewards, values, masks, advantages, returns, strict=True):
        inside = mask_L.bool()
        wanted = reference_gae(reward_L[inside].tolist(), value_L[inside].tolist(), gamma, lam)
        assert advantage_L[inside].tolist() == pytest.approx(wanted, abs=1e-5)
        assert (return_L - advantage_L)[inside].tolist() == pytest.approx(value_L[inside].tolist(), abs=1e-5)
        assert not advantage_L[~inside].any() and not return_L[~inside].any()
        ((alone,), _) = gae_ragged([reward_L], [value_L], [mask_L], gamma, lam)
        assert torch.equal(alone, advantage_L)


def test_gae_of_nothing() -> None:
    assert gae_ragged([], [], [], 1.0, 1.0) == ([], [])
    advantages_T, returns_T = gae_packed(torch.randn(5), torch.randn(5), torch.zeros(5), torch.zeros(5).long(), 1.0, 0.9)
    assert not advantages_T.any() and not returns_T.any()


def test_monte_carlo_return_is_the_final_reward() -> None:
    mask_L = torch.tensor([0, 0, 1, 1, 1, 0])
    rewards_L = token_rewards(0.75, mask_L)
    assert rewards_L.tolist() == [0, 0, 0, 0, 0.75, 0]
    _, (returns_L,) = gae_ragged([rewards_L], [torch.randn(6)], [mask_L], 1.0, 1.0)
    assert returns_L.tolist() == pytest.approx([0, 0, 0.75, 0.75, 0.75, 0])


def test_token_rewards_take_the_kl_off_every_response_token() -> None:
    kl_L = torch.tensor([9.0, 0.5, -0.25, 9.0])
    rewards_L = token_rewards(1.0, torch.tensor([0, 1, 1, 0]), kl_L, 0.1)
    assert rewards_L.tolist() == pytest.approx([0.0, -0.05, 1.025, 0.0])
    assert not token_rewards(1.0, torch.zeros(3)).any()


def test_whitening_is_the_same_however_ranks_share_the_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    values_T = 5 + 3 * torch.randn(41, generator=generator)
    mask_T = (torch.rand(41, generator=generator) < 0.6).float()
    chosen = values_T[mask_T.bool()].double()
    wanted = (chosen - chosen.mean()) / chosen.std(correction=0)
    whole = whiten(values_T, mask_T)
    assert torch.allclose(whole[mask_T.bool()].double(), wanted, atol=1e-5)
    assert not whole[mask_T == 0].any()

    parts = [(values_T[a:b], mask_T[a:b]) for a, b in [(0, 7), (7, 7), (7, 30), (30, 41)]]
    local: list[torch.Tensor] = []
    for values, mask in parts:
        whiten(values, mask, lambda sums: local.append(sums) or sums)
    total = torch.stack(local).sum(0)
    assert total.dtype == torch.float64
    shared = torch.cat([whiten(values, mask, lambda _: total) for values, mask in parts])
    assert torch.allclose(shared, whole, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_whitening_equal_values_or_nothing_gives_zeros(value: float) -> None:
    assert whiten(torch.full((6,), value), torch.tensor([1.0, 1, 1, 0, 0, 1])).abs().max() < 1e-3
    assert not whiten(torch.full((6,), value), torch.zeros(6)).any()


def test_group_relative_advantages_leave_invalid_samples_out() -> None:
    rewards, valid = [1.0, 0.0, math.nan, 0.5, 0.0], [True, True, False, True, True]
    counted = [1.0, 0.0, 0.5, 0.0]
    mean, deviation = statistics.mean(counted), statistics.stdev(counted)
    plain = group_relative_advantages(rewards, valid, normalize_by_std=False)
    scaled = group_relative_advantages(rewards, valid, normalize_by_std=True)
    assert plain == pytest.approx([1 - mean, -mean, 0.0, 0.5 - mean, -mean])
    assert scaled == pytest.approx([value / deviation for value in plain], rel=1e-4)
    assert plain[2] == 0.0 and scaled[2] == 0.0


@pytest.mark.parametrize("normalize", [True, False])
def test_groups_without_contrast_give_exact_zeros(normalize: bool) -> None:
    for rewards, valid in [([0.1] * 7, [True] * 7), ([3.0, 9.0], [True, False]), ([1.0, 2.0], [False, False]), ([], [])]:
        assert group_relative_advantages(rewards, valid, normalize) == [0.0] * len(rewards)


def test_group_relative_advantages_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="finite"):
        group_relative_advantages([1.0, math.inf], [True, True], True)
    with pytest.raises(ValueError, match="2 rewards"):
        group_relative_advantages([1.0, 2.0], [True], True)


def test_fixed_controller_stays_and_adaptive_one_steers() -> None:
    fixed = make_kl_controller(AlgorithmConfig(kl_coefficient=0.3))
    fixed.update(100.0, 64)
    assert fixed.coefficient == 0.3
    adaptive = make_kl_controller(AlgorithmConfig(kl_coefficient=0.3, kl_controller="adaptive", kl_target=2.0, kl_horizon=1000.0))
    adaptive.update(2.2, 100)
    assert adaptive.coefficient == pytest.approx(0.3 * (1 + 0.1 * 0.1))
    before = adaptive.coefficient
    adaptive.update(1e9, 100)
    assert adaptive.coefficient == pytest.approx(before * (1 + 0.2 * 0.1))
    before = adaptive.coefficient
    adaptive.update(0.0, 100)
    assert adaptive.coefficient == pytest.approx(before * (1 - 0.2 * 0.1))
    with pytest.raises(ValueError, match=r"algorithm\.kl_target"):
        make_kl_controller(AlgorithmConfig(kl_controller="adaptive", kl_target=0.0))
