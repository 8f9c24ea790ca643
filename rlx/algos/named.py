"""Policy losses and advantages of groups by name, in place of an algorithm's own: ``algorithm.loss`` and
``algorithm.advantages``. A name is a row of the tables here or ``path/to/file.py:function``.

A loss is ``function(inputs, config)`` and returns a ``LossOutput``, or the loss alone: a sum over tokens, with gradient. An
advantage is ``function(rewards, valid, config)`` and returns a number for each answer of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlx.algos.base import Algorithm
from rlx.algos.cispo import clipped_weight_loss
from rlx.algos.grpo import group_relative_advantages
from rlx.algos.gspo import sequence_ratio_loss
from rlx.algos.policy_loss import clipped_term, with_extras
from rlx.algos.rloo import leave_one_out_advantages
from rlx.config.algorithm import AlgorithmConfig
from rlx.config.user_function import UserFunction
from rlx.types.batch import LossInputs, LossOutput

LOSSES: Mapping[str, Callable[[LossInputs, AlgorithmConfig], LossOutput]] = {
    "clipped": clipped_term,
    "sequence": sequence_ratio_loss,
    "clipped_weight": clipped_weight_loss,
}
ADVANTAGES: Mapping[str, Callable[[Sequence[float], Sequence[bool], AlgorithmConfig], Sequence[float]]] = {
    "group_relative": lambda rewards, valid, config: group_relative_advantages(rewards, valid, config.normalize_by_std),
    "leave_one_out": lambda rewards, valid, config: leave_one_out_advantages(rewards, valid),
}


def with_named_parts(algorithm: Algorithm, config: AlgorithmConfig) -> Algorithm:
    """``algorithm`` with the loss and the advantages that ``config`` names. ValueError names what cannot be had."""
    if config.loss is not None:
        term = _find("algorithm.loss", config.loss, LOSSES)
        algorithm = replace(
            algorithm, policy_loss=lambda inputs: with_extras(_checked_loss(config, term(inputs, config)), inputs, config)
        )
    if config.advantages is not None:
        function = _find("algorithm.advantages", config.advantages, ADVANTAGES)
        algorithm = replace(
            algorithm,
            group_advantages=lambda rewards, valid, _: _checked_advantages(config, rewards, function(rewards, valid, config)),
        )
    return algorithm


def try_named_parts(algorithm: Algorithm, config: AlgorithmConfig) -> None:
    """Call what ``config`` names once, on four tokens and on one group. ValueError for whatever they raise or return that a run
    could not go on with."""
    if config.loss is not None:
        inputs = _four_tokens()
        assert inputs.logprobs_T is not None
        loss = _tried("algorithm.loss", config.loss, lambda: algorithm.policy_loss(inputs).loss)
        if not loss.requires_grad or torch.autograd.grad(loss, inputs.logprobs_T, allow_unused=True)[0] is None:
            raise ValueError(f"algorithm.loss: {config.loss} returns a loss without a gradient for inputs.logprobs_T")
    if config.advantages is not None and algorithm.group_advantages is not None:
        advantages, rewards, valid = algorithm.group_advantages, [1.0, 0.0, 0.5, 0.0], [True, True, True, False]
        _tried("algorithm.advantages", config.advantages, lambda: advantages(rewards, valid, None))


def _tried(key: str, name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        # Users' code: whatever it raises now it would raise in every step.
        if str(error).startswith(key):
            raise
        raise ValueError(f"{key}: {name} fails when it is tried: {type(error).__name__}: {error}") from error


def _find(key: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if ":" not in name:
        if name not in table:
            raise ValueError(f"{key} must be one of {', '.join(table)}, or path/to/file.py:function; got {name!r}")
        return table[name]
    function = UserFunction(key, name)
    wanted = ("inputs", "config") if table is LOSSES else ("rewards", "valid", "config")
    if function.signature is not None:
        try:
            function.signature.bind(*wanted)
        except TypeError as error:
            raise ValueError(f"{key}: {name}{function.signature} cannot be called with ({', '.join(wanted)}): {error}") from error
    return function


def _checked_loss(config: AlgorithmConfig, found: object) -> LossOutput:
    output = LossOutput(loss=found, stats={}) if isinstance(found, Tensor) else found
    if not isinstance(output, LossOutput) or output.loss.dim():
        what = f"a tensor of shape {list(output.loss.shape)}" if isinstance(output, LossOutput) else repr(found)
        raise ValueError(f"algorithm.loss: {config.loss} returned {what}; expected a LossOutput or the sum over tokens")
    return output


def _checked_advantages(config: AlgorithmConfig, rewards: Sequence[float], found: Any) -> list[float]:
    try:
        advantages = [float(value) for value in found]
    except (TypeError, ValueError):
        advantages = []
    if len(advantages) != len(rewards) or not all(map(math.isfinite, advantages)):
        raise ValueError(f"algorithm.advantages: {config.advantages} returned {found!r}; expected {len(rewards)} finite numbers")
    return advantages


def _four_tokens() -> LossInputs:
    """Two answers, the first of two tokens, the second of one beside a token that counts for nothing."""
    logprobs_T = torch.tensor([-0.5, -1.0, -0.2, -2.0], requires_grad=True)
    return LossInputs(
        weights_T=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        sequence_T=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        logprobs_T=logprobs_T,
        entropy_T=torch.tensor([0.7, 0.9, 0.3, 1.0], requires_grad=True),
        old_logprobs_T=torch.tensor([-0.6, -0.9, -0.2, -2.0]),
        ref_logprobs_T=torch.tensor([-0.6, -1.1, -0.3, -2.0]),
        advantages_T=torch.tensor([1.0, 1.0, -1.0, 0.0]),
    )
