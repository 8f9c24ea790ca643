"""Policy, value and KL losses: against formulas in plain Python, finite differences, and any split of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from rlx.algos.kl import kl_estimate
from rlx.algos.policy_loss import clipped_policy_loss
from rlx.algos.registry import ALGORITHMS, make_algorithm
from rlx.algos.value_loss import clipped_value_loss, explained_variance, fit
from rlx.config.schema import AlgorithmConfig
from rlx.types.batch import LossInputs, LossOutput

CONFIG = AlgorithmConfig(
    clip_low=0.1, clip_high=0.3, value_clip=0.15, entropy_coefficient=0.02, kl_placement="loss", kl_coefficient=0.4
)


def random_inputs(num_tokens: int = 37, seed: int = 0) -> LossInputs:
    """float64 columns with masked tokens; weights are not only 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    weights_T = torch.rand(num_tokens, generator=generator, dtype=torch.float64) * (draw() > -0.3)
    logprobs_T, values_T = -draw().abs(), draw()
    return LossInputs(
        weights_T=weights_T,
        logprobs_T=logprobs_T,
        entropy_T=draw().abs(),
        values_T=values_T,
        old_logprobs_T=logprobs_T + draw(0.3),
        ref_logprobs_T=logprobs_T + draw(0.5),
        advantages_T=draw(2.0),
        old_values_T=values_T + draw(0.3),
        returns_T=draw(),
    )


def reference_policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> float:
    total = 0.0
    columns = (inputs.weights_T, inputs.logprobs_T, inputs.old_logprobs_T, inputs.ref_logprobs_T, inputs.advantages_T)
    for index, (weight, new, old, ref, advantage) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        surrogate = min(ratio * advantage, clipped * advantage)
        kl = math.exp(ref - new) - 1 - (ref - new)
        entropy = float(inputs.entropy_T[index])
        total += weight * (-surrogate - config.entropy_coefficient * entropy + config.kl_coefficient * kl)
    return total


def reference_value_loss(inputs: LossInputs, clip: float | None) -> float:
    total = 0.0
    columns = (inputs.weights_T, inputs.values_T, inputs.old_values_T, inputs.returns_T)
    for weight, value, old, wanted in zip(*(c.tolist() for c in columns), strict=True):
        errors = [(value - wanted) ** 2]
        if clip is not None:
            errors.append((min(max(value, old - clip), old + clip) - wanted) ** 2)
        total += weight * 0.5 * max(errors)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"gspo", "cispo"}))
def test_policy_loss_equals_the_formula(name: str, seed: int) -> None:
    config = replace(CONFIG, name=name)
    inputs = random_inputs(seed=seed)
    output = make_algorithm(config).policy_loss(inputs)
    assert float(output.loss) == pytest.approx(reference_policy_loss(inputs, config), rel=1e-10)


@pytest.mark.parametrize("clip", [None, 0.0, 0.15])
def test_value_loss_equals_the_formula(clip: float | None) -> None:
    inputs = random_inputs(seed=5)
    output = clipped_value_loss(inputs, clip)
    assert float(output.loss) == pytest.approx(reference_value_loss(inputs, clip), rel=1e-10)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_those_of_finite_differences(estimator: str) -> None:
    algorithm = make_algorithm(replace(CONFIG, kl_estimator=estimator))
    inputs = random_inputs(11, seed=7)

    def policy(logprobs_T: Tensor, entropy_T: Tensor) -> Tensor:
        return algorithm.policy_loss(replace(inputs, logprobs_T=logprobs_T, entropy_T=entropy_T)).loss

    def value(values_T: Tensor) -> Tensor:
        assert algorithm.value_loss is not None
        return algorithm.value_loss(replace(inputs, values_T=values_T)).loss

    assert torch.autograd.gradcheck(policy, (inputs.logprobs_T.requires_grad_(), inputs.entropy_T.requires_grad_()))
    assert torch.autograd.gradcheck(value, (inputs.values_T.requires_grad_(),))


def cut(inputs: LossInputs, start: int, end: int) -> LossInputs:
    return replace(inputs, **{name: column[start:end] for name, column in columns_of(inputs).items()})


def columns_of(inputs: LossInputs) -> dict[str, Tensor]:
    columns = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: column for name, column in columns.items() if isinstance(column, Tensor)}


@pytest.mark.parametrize("which", ["policy", "value"])
def test_losses_and_statistics_do_not_depend_on_how_tokens_are_split(which: str) -> None:
    algorithm = make_algorithm(CONFIG)
    loss = algorithm.policy_loss if which == "policy" else algorithm.value_loss
    assert loss is not None
    inputs = random_inputs(53, seed=11)
    whole = loss(inputs)
    parts = [loss(cut(inputs, start, end)) for start, end in [(0, 1), (1, 1), (1, 20), (20, 52), (52, 53)]]
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-12)
    for name, stat in whole.stats.items():
        assert stat.shape == (2,) and not stat.requires_grad
        assert torch.allclose(torch.stack([part.stats[name] for part in parts]).sum(0), stat, rtol=1e-12)


def losses() -> list[Callable[[LossInputs], LossOutput]]:
    algorithm = make_algorithm(CONFIG)
    assert algorithm.value_loss is not None
    return [algorithm.policy_loss, algorithm.value_loss]


def test_masked_tokens_may_hold_anything() -> None:
    clean = random_inputs(seed=13)
    off = clean.weights_T == 0
    assert off.any()
    dirty = {}
    for index, (name, column) in enumerate(columns_of(clean).items()):
        poison = [math.nan, math.inf, -math.inf][index % 3]
        dirty[name] = column if name == "weights_T" else torch.where(off, torch.tensor(poison).double(), column)
    dirty["logprobs_T"].requires_grad_()
    dirty["values_T"].requires_grad_()
    for loss in losses():
        wanted, found = loss(clean), loss(LossInputs(**dirty))
        assert float(found.loss.detach()) == pytest.approx(float(wanted.loss))
        for name, stat in wanted.stats.items():
            assert torch.allclose(found.stats[name], stat)
        found.loss.backward()
    assert dirty["logprobs_T"].grad.isfinite().all() and not dirty["logprobs_T"].grad[off].any()
    assert dirty["values_T"].grad.isfinite().all() and not dirty["values_T"].grad[off].any()


def test_nothing_to_train_on_gives_zero_with_a_gradient() -> None:
    inputs = random_inputs(9)
    inputs = replace(inputs, weights_T=torch.zeros(9).double())
    inputs.logprobs_T.requires_grad_()
    inputs.values_T.requires_grad_()
    for loss in losses():
        output = loss(inputs)
        output.loss.backward()
        assert float(output.loss) == 0.0
        assert all(stat.tolist() == [0.0, 0.0] for stat in output.stats.values())
    assert not inputs.logprobs_T.grad.any()


@pytest.mark.parametrize("gap", [-1e4, -60.0, 60.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_stay_finite(gap: float, advantage: float) -> None:
    one = torch.ones(1)
    new = torch.tensor([-1.0 + gap], requires_grad=True)
    inputs = LossInputs(
        weights_T=one, logprobs_T=new, entropy_T=one, old_logprobs_T=-one, ref_logprobs_T=-one, advantages_T=advantage * one
    )
    output = make_algorithm(CONFIG).policy_loss(inputs)
    output.loss.backward()
    assert output.loss.isfinite() and new.grad.isfinite().all()
    assert all(stat.isfinite().all() for stat in output.stats.values())


def test_statistics_say_what_they_are_named() -> None:
    new = torch.tensor([math.log(1.5), math.log(0.5), 0.0, 9.0])
    inputs = LossInputs(
        weights_T=torch.tensor([1.0, 0.5, 2.0, 0.0]),
        logprobs_T=new,
        old_logprobs_T=torch.zeros(4),
        advantages_T=torch.tensor([1.0, 1.0, 3.0, 1.0]),
    )
    stats = clipped_policy_loss(inputs, 0.2, 0.2).stats
    assert stats["ratio"].tolist() == pytest.approx([3.0, 3.0])
    # 1.5 is held at 1.2; 0.5 with a positive advantage is not.
    assert stats["clip_fraction"].tolist() == [1.0, 3.0]
    assert stats["policy"].tolist() == pytest.approx([-1.2 - 0.5 - 3.0, 3.0])
    assert stats["approx_kl"].tolist() == pytest.approx([0.5 - math.log(1.5) - 0.5 - math.log(0.5), 3.0])
    assert "kl_ref" not in stats


def test_explained_variance_is_that_of_the_masked_tokens() -> None:
    inputs = random_inputs(101, seed=17)
    values, returns, mask = inputs.values_T, inputs.returns_T, inputs.weights_T
    keep = mask != 0
    wanted = 1 - (returns - values)[keep].var(correction=0) / returns[keep].var(correction=0)

    def explained(values: Tensor, returns: Tensor) -> float | None:
        """Of two samples, as a rank would add them up."""
        parts = [fit(values[some], returns[some], mask[some]) for some in (slice(0, 40), slice(40, 101))]
        sums = {name: sum(part[name] for part in parts) for name in parts[0]}
        return explained_variance({name: float(total / count) for name, (total, count) in sums.items()})

    assert explained(values, returns) == pytest.approx(float(wanted))
    assert explained(returns, returns) == pytest.approx(1.0)
    assert explained(values, torch.full_like(returns, 0.25)) is None


def test_kl_estimators_have_the_expectation_that_is_known() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        assert float((policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()) == pytest.approx(float(exact))
    k2 = (policy * kl_estimate(policy.log(), reference.log(), "k2")).sum()
    assert float(k2) == pytest.approx(float((policy * (policy / reference).log() ** 2 / 2).sum()))
    assert (kl_estimate(policy.log(), reference.log(), "k3") >= 0).all()


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="advantages_T"):
        clipped_policy_loss(replace(random_inputs(), advantages_T=None), 0.2, 0.2)
    with pytest.raises(ValueError, match="k9"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k9")
    with pytest.raises(ValueError, match="ppo, grpo"):
        make_algorithm(AlgorithmConfig(name="sarsa"))
