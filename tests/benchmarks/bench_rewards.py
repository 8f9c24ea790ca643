"""Reward throughput: `make bench-rewards`. Prints answers a second of the pool beside math-verify in line, and the cost of
verifiers that never end. Fails where the pool misses what docs/rewards.md promises on two idle cores."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import math_verify

from rlx.config.schema import RewardConfig
from rlx.rewards.processes import ProcessPool
from rlx.types import Completion, Prompt, RolloutGroup

LOOPING = """
def judge(prompt, response, label, **extra):
    while response == "loop":
        pass
    return float(response == label)
"""


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def group(prompt_id: int, label: str, answers: Sequence[str]) -> RolloutGroup:
    completions = tuple(
        Completion(token_ids=tuple(map(ord, text)), rollout_logprobs=(), finish_reason="stop", weight_versions=())
        for text in answers
    )
    return RolloutGroup(prompt=Prompt(prompt_id=prompt_id, token_ids=(1,), text="", label=label), completions=completions)


def math_groups(num_groups: int, share_symbolic: float) -> list[RolloutGroup]:
    """Groups of 8: some answers right, some wrong; labels are integers or fractions."""
    draw = random.Random(0)
    groups = []
    for index in range(num_groups):
        value = draw.randrange(10_000)
        if draw.random() < share_symbolic:
            label = f"\\frac{{{value}}}{{7}}"
            answers = [f"\\frac{{{2 * value + draw.choice([0, 0, 2])}}}{{14}}" for _ in range(8)]
        else:
            label, answers = str(value), [str(value + draw.choice([0, 0, 1, -3])) for _ in range(8)]
        groups.append(group(index, label, [f"Let me think. {'So on and on. ' * 30}It is \\boxed{{{text}}}." for text in answers]))
    return groups


def warm(pool: ProcessPool, one: RolloutGroup) -> None:
    list(pool.score([one]))


def bench_math(num_groups: int, share_symbolic: float) -> float:
    groups = math_groups(num_groups, share_symbolic)
    pool = ProcessPool(decode, RewardConfig(name="math", num_workers=2))
    warm(pool, group(0, "1", ["\\boxed{1}", "\\boxed{\\frac{2}{2}}"] * 4))
    start_s = time.monotonic()
    scored = list(pool.score(groups))
    pool_rate = 8 * num_groups / (time.monotonic() - start_s)
    pool.close()
    sample = scored[: max(1, num_groups // 10)]
    start_s = time.monotonic()
    for one in sample:
        gold = math_verify.parse(f"\\boxed{{{one.prompt.label}}}")
        for completion, reward in zip(one.completions, one.rewards or (), strict=True):
            right = math_verify.verify(gold, math_verify.parse(decode(completion.token_ids)))
            assert float(right) == reward.value, (one.prompt.label, decode(completion.token_ids))
    line_rate = 8 * len(sample) / (time.monotonic() - start_s)
    print(
        f"math, {share_symbolic:.0%} symbolic: pool {pool_rate:,.0f} answers/s on 2 processes; in line {line_rate:,.0f} answers/s"
    )
    return pool_rate


def bench_loops(limit_s: float, num_workers: int) -> float:
    """1,000 answers, 100 of which never end; the time over the sum of limits / workers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "looping.py"
        file.write_text(LOOPING)
        pool = ProcessPool(decode, RewardConfig(name=f"{file}:judge", num_workers=num_workers, timeout_s=limit_s))
        warm(pool, group(0, "1", ["1"] * 8))
        spots = set(random.Random(1).sample(range(1000), 100))
        answers = ["loop" if index in spots else str(index % 3) for index in range(1000)]
        groups = [group(index, "1", answers[8 * index : 8 * index + 8]) for index in range(125)]
        start_s = time.monotonic()
        rewards = [reward for one in pool.score(groups) for reward in one.rewards or ()]
        wall_s = time.monotonic() - start_s
        pool.close()
    for index, reward in enumerate(rewards):
        assert reward.valid == (index not in spots), (index, reward)
        assert not reward.valid or reward.value == float(answers[index] == "1")
    ideal_s = 100 * limit_s / num_workers
    print(f"100 endless of 1,000 answers: {wall_s:.1f} s, {wall_s / ideal_s:.2f} x the sum of limits / workers; 900 right")
    return wall_s / ideal_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=1500)
    parser.add_argument("--limit-s", type=float, default=0.5)
    args = parser.parse_args()
    bench_math(args.groups, share_symbolic=1.0)
    rate = bench_math(args.groups, share_symbolic=0.2)
    ratio = bench_loops(args.limit_s, num_workers=2)
    assert rate >= 2000, f"{rate:.0f} answers/s, expected 2,000"
    assert ratio <= 1.5, f"{ratio:.2f} x the sum of limits, expected at most 1.5"


if __name__ == "__main__":
    main()
