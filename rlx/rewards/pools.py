"""Which pool judges what: processes for verifiers that compute, threads for those that wait for a server.

A sum with parts of both kinds is a chain: the groups run through the process pool and then through the threads, each
overlapping the other, and the verdicts are put together at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from rlx.config.schema import RewardConfig
from rlx.rewards.processes import ProcessPool
from rlx.rewards.registry import SUM, is_remote, make_verifier, part_configs
from rlx.rewards.service import AllVerdictsInvalidError, RewardPool, ScoringService
from rlx.rewards.weighted import Part, combine
from rlx.types import Completion, Prompt, Reward, RolloutGroup

Decode = Callable[[Sequence[int]], str]


def make_reward_service(config: RewardConfig, decode: Decode) -> ScoringService | Chain:
    """The service for ``config``; ValueError when its verifier cannot be made."""
    if config.name == SUM and is_remote(config) and not all(is_remote(part.config) for part in part_configs(config)):
        return Chain(config, decode)
    verifier = make_verifier(config)
    return RewardPool(verifier, decode, config) if is_remote(config) else ProcessPool(decode, config)


class Chain:
    """One pool a part, in a row."""

    def __init__(self, config: RewardConfig, decode: Decode) -> None:
        self._parts = [Part(name=part.called, weight=part.weight, verifier=_nobody) for part in part_configs(config)]
        self._pools = [make_reward_service(part.config, decode) for part in part_configs(config)]

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """As ``ScoringService.score``; raises AllVerdictsInvalidError as soon as one part has no valid verdict."""
        verdicts: dict[int, list[tuple[Reward, ...]]] = {}

        def noting(scored: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
            for group in scored:
                assert group.rewards is not None
                verdicts.setdefault(id(group.completions), []).append(group.rewards)
                yield replace(group, rewards=None)

        stream: Iterable[RolloutGroup] = groups
        for pool in self._pools:
            stream = noting(pool.score(stream))
        num_valid = num_all = 0
        for group in stream:
            rows = verdicts.pop(id(group.completions))
            rewards = tuple(combine(list(zip(self._parts, column, strict=True))) for column in zip(*rows, strict=True))
            num_all, num_valid = num_all + len(rewards), num_valid + sum(reward.valid for reward in rewards)
            yield replace(group, rewards=rewards)
        if num_all and not num_valid:
            raise AllVerdictsInvalidError(f"all {num_all} verdicts of the batch are invalid in one part or another")

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


def _nobody(prompt: Prompt, response_text: str, completion: Completion) -> Reward:
    raise AssertionError("a chain's parts are judged by its pools")
