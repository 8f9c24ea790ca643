"""Which pool judges what: processes for verifiers that compute, threads for those that wait for a server.

A sum with parts of both kinds is a chain: the groups run through the process pool and then through the threads, each
overlapping the other, and the verdicts are put together at the end. With verifiers of both kinds by source, each answer goes
to the pool of its source's kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from rlx.config.schema import RewardConfig
from rlx.rewards.base import asks_group, bounded, invalid
from rlx.rewards.by_source import UnknownSourceError, of_source
from rlx.rewards.pool.processes import ProcessPool
from rlx.rewards.pool.service import (
    AllVerdictsInvalidError,
    RewardPool,
    ScoringService,
    Verdict,
)
from rlx.rewards.registry import SUM, is_mixed, is_remote, make_verifier, part_configs, source_configs
from rlx.rewards.request import RewardRequest
from rlx.rewards.weighted import Part, combine
from rlx.types.rollout import (
    Reward,
    RolloutGroup,
)

Decode = Callable[[Sequence[int]], str]


def make_reward_service(config: RewardConfig, decode: Decode) -> ScoringService | Chain:
    """The service for ``config``; ValueError when its verifier cannot be made."""
    if is_mixed(config):
        return Chain(config, decode) if config.name == SUM else SplitBySource(config, decode)
    return _one_kind(config, decode)


def _one_kind(config: RewardConfig, decode: Decode) -> RewardPool | ProcessPool:
    verifier = make_verifier(config)
    if is_remote(config):
        return RewardPool(verifier, decode, config)
    return ProcessPool(decode, config, gives_group=asks_group(verifier))


class Chain:
    """One pool a part, in a row."""

    def __init__(self, config: RewardConfig, decode: Decode) -> None:
        self._max_abs = config.max_abs
        self._parts = [Part(name=part.called, weight=part.weight, verifier=_nobody) for part in part_configs(config)]
        self._pools = [make_reward_service(part.config, decode) for part in part_configs(config)]

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """As ``ScoringService.score``; raises AllVerdictsInvalidError as soon as one part has no valid verdict."""
        verdicts: dict[int, list[tuple[Reward, ...]]] = {}

        def noting(scored: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
            for group in scored:
                assert group.rewards is not None
                verdicts.setdefault(id(group.trajectories), []).append(group.rewards)
                yield replace(group, rewards=None)

        stream: Iterable[RolloutGroup] = groups
        for pool in self._pools:
            stream = noting(pool.score(stream))
        num_valid = num_all = 0
        for group in stream:
            rows = verdicts.pop(id(group.trajectories))
            sums = (combine(list(zip(self._parts, column, strict=True))) for column in zip(*rows, strict=True))
            rewards = tuple(bounded(reward, self._max_abs) for reward in sums)
            num_all, num_valid = num_all + len(rewards), num_valid + sum(reward.valid for reward in rewards)
            yield replace(group, rewards=rewards)
        if num_all and not num_valid:
            raise AllVerdictsInvalidError(f"all {num_all} verdicts of the batch are invalid in one part or another")

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


class SplitBySource(ScoringService):
    """A pool a kind; the pool of an answer is that of its prompt's source."""

    def __init__(self, config: RewardConfig, decode: Decode) -> None:
        super().__init__(decode, config)
        named, otherwise = source_configs(config)
        self._pools: dict[bool, ScoringService] = {}
        self._kinds = {source: is_remote(one) for source, one in named.items()}
        self._otherwise = None if otherwise is None else is_remote(otherwise)
        for remote in (False, True):
            rows = {source: row for source, row in config.args["sources"].items() if self._kinds[str(source)] == remote}
            rest = {"otherwise": config.args["otherwise"]} if self._otherwise == remote else {}
            # Without a source of its own kind, "otherwise" is all that this pool has to judge.
            own = replace(config, args={"sources": rows, **rest}) if rows else otherwise
            assert own is not None
            self._pools[remote] = _one_kind(own, decode)

    def submit(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            try:
                kind = of_source(self._kinds, verdict.request.prompt.source, self._otherwise)
            except UnknownSourceError as error:
                verdict.settle(invalid(f"{type(error).__name__}: {error}"))
            else:
                self._pools[kind].submit([verdict])

    def tick(self) -> None:
        for pool in self._pools.values():
            pool.tick()

    def close(self) -> None:
        super().close()
        for pool in self._pools.values():
            pool.close()


def _nobody(request: RewardRequest) -> Reward:
    raise AssertionError("a chain's parts are judged by its pools")
