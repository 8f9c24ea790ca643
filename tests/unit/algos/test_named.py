"""Losses and advantages by name: the library's rows, functions in files, and what is refused before the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlx.algos.named import ADVANTAGES, LOSSES, _four_tokens
from rlx.algos.registry import make_algorithm, try_algorithm
from rlx.config.algorithm import GROUP_ADVANTAGES, AlgorithmConfig

TEXT = """
import torch
from rlx.types.batch import LossOutput

def doubled(inputs, config):
    return 2 * (inputs.weights_T * -inputs.advantages_T * inputs.logprobs_T).sum() * config.gamma
def output(inputs, config):
    return LossOutput(loss=doubled(inputs, config), stats={"policy": torch.tensor([1.0, 2.0])})
def ranks(rewards, valid, config):
    return [sum(other < reward for other in rewards) for reward in rewards]
def of_three(a, b, c, d): ...
def per_token(inputs, config):
    return inputs.logprobs_T
def without_gradient(inputs, config):
    return inputs.old_logprobs_T.sum()
def broken(*arguments):
    raise KeyError("no such thing")
def short(rewards, valid, config):
    return [0.5]
def nan(rewards, valid, config):
    return [float("nan")] * len(rewards)
async def later(inputs, config): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(("name", "loss"), [("grpo", "clipped"), ("gspo", "sequence"), ("cispo", "clipped_weight")])
def test_the_librarys_losses_are_those_of_the_algorithms(name: str, loss: str) -> None:
    own = AlgorithmConfig(name=name, entropy_coefficient=0.1, kl_placement="loss", kl_coefficient=0.2)
    named = replace(own, loss=loss)
    inputs = _four_tokens()
    assert torch.equal(make_algorithm(own).policy_loss(inputs).loss, make_algorithm(named).policy_loss(inputs).loss)
    try_algorithm(named)


def test_the_librarys_advantages_are_those_of_the_algorithms() -> None:
    rewards, valid = [1.0, 0.0, 0.25, 9.0], [True, True, True, False]
    for name, row in (("grpo", "group_relative"), ("rloo", "leave_one_out")):
        own = make_algorithm(AlgorithmConfig(name=name)).group_advantages
        named = make_algorithm(AlgorithmConfig(name=name, advantages=row)).group_advantages
        assert own is not None and named is not None and own(rewards, valid, None) == named(rewards, valid, None)
    assert all(
        make_algorithm(AlgorithmConfig(name=name)).kind == "group" for name in GROUP_ADVANTAGES if name in ("grpo", "rloo")
    )


def test_functions_of_a_file_take_their_places(file: Path) -> None:
    config = AlgorithmConfig(name="grpo", gamma=0.5, loss=f"{file}:doubled", advantages=f"{file}:ranks", entropy_coefficient=1.0)
    algorithm, inputs = make_algorithm(config), _four_tokens()
    assert inputs.logprobs_T is not None and inputs.entropy_T is not None and inputs.advantages_T is not None
    expected = (inputs.weights_T * (-inputs.advantages_T * inputs.logprobs_T - inputs.entropy_T)).sum()
    assert torch.allclose(algorithm.policy_loss(inputs).loss, expected)
    assert algorithm.group_advantages is not None
    assert algorithm.group_advantages([1.0, 0.0, 0.5], [True] * 3, None) == [2.0, 0.0, 1.0]
    try_algorithm(config)
    with_stats = make_algorithm(replace(config, loss=f"{file}:output")).policy_loss(inputs)
    assert with_stats.stats["policy"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("key", "function", "message"),
    [
        ("loss", "of_three", r"algorithm\.loss: .*mine\.py:of_three\(a, b, c, d\) cannot be called with \(inputs, config\)"),
        ("loss", "per_token", r"mine\.py:per_token returned a tensor of shape \[4\]; expected a LossOutput or the sum"),
        ("loss", "without_gradient", r"mine\.py:without_gradient returns a loss without a gradient for inputs\.logprobs_T"),
        ("loss", "broken", r"algorithm\.loss: .*mine\.py:broken fails when it is tried: KeyError: 'no such thing'"),
        ("loss", "nothing", r"algorithm\.loss: .*mine\.py has no function 'nothing'"),
        ("loss", "later", r"algorithm\.loss: later of .*mine\.py is asynchronous"),
        ("advantages", "of_three", r"algorithm\.advantages: .* cannot be called with \(rewards, valid, config\)"),
        ("advantages", "short", r"mine\.py:short returned \[0\.5\]; expected 4 finite numbers"),
        ("advantages", "nan", r"mine\.py:nan returned .*; expected 4 finite numbers"),
        ("advantages", "broken", r"algorithm\.advantages: .*mine\.py:broken fails when it is tried: KeyError"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_start(file: Path, key: str, function: str, message: str) -> None:
    values = {key: f"{file}:{function}"}
    config = replace(AlgorithmConfig(name="grpo"), loss=values.get("loss"), advantages=values.get("advantages"))
    with pytest.raises(ValueError, match=message):
        try_algorithm(config)


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"algorithm.loss must be one of {', '.join(LOSSES)}, or path"):
        make_algorithm(AlgorithmConfig(loss="cliped"))
    with pytest.raises(ValueError, match=f"algorithm.advantages must be one of {', '.join(ADVANTAGES)}, or path"):
        make_algorithm(AlgorithmConfig(name="grpo", advantages="best"))
