"""Reward throughput: `make bench-rewards`. Prints answers a second of the pool beside math-verify in line, and the cost of
verifiers that never end. Fails where the pool misses what docs/rewards.md promises; judged by processor time, which other
programs on the machine change little."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import math_verify
import psutil

from rlx.config.schema import RewardConfig
from rlx.rewards.math import MathVerify
from rlx.rewards.pool.processes import ProcessPool
from rlx.types.rollout import Prompt, RolloutGroup
from tests.trajectories import text_group

LOOPING = """
def judge(prompt, response, label, **extra):
    while response == "loop":
        pass
    return float(response == label)
"""


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def group(prompt_id: int, label: str, answers: Sequence[str]) -> RolloutGroup:
    return text_group(Prompt(prompt_id=prompt_id, token_ids=(1,), text="", label=label), *answers)


def numbers_and_fractions(num_groups: int) -> list[RolloutGroup]:
    """As a batch of arithmetic looks: four labels of five integers, the fifth a fraction; few different answers a prompt."""
    draw = random.Random(0)
    groups = []
    for index in range(num_groups):
        value = draw.randrange(10_000)
        if draw.random() < 0.2:
            label = f"\\frac{{{value}}}{{7}}"
            answers = [f"\\frac{{{2 * value + draw.choice([0, 0, 2])}}}{{14}}" for _ in range(8)]
        else:
            label, answers = str(value), [str(value + draw.choice([0, 0, 1, -3])) for _ in range(8)]
        groups.append(group(index, label, [boxed(text) for text in answers]))
    return groups


def expressions(num_groups: int) -> list[RolloutGroup]:
    """Every answer another one, none of them a plain number: no short cut applies, each is parsed and compared."""
    draw = random.Random(1)
    groups = []
    for index in range(num_groups):
        a, b = draw.randrange(2, 10_000), draw.randrange(2, 1_000)
        forms = [f"{a}+{b}\\sqrt{{2}}", f"{b}\\sqrt{{2}}+{a}", f"{a}+\\sqrt{{{2 * b * b}}}", f"{a + 1}-1+{b}\\sqrt{{2}}"]
        forms += [f"{a}+{b + n}\\sqrt{{2}}" for n in range(1, 5)]
        groups.append(group(index, f"\\sqrt{{2}}\\cdot {b}+{a}", [boxed(text) for text in forms]))
    return groups


def boxed(text: str) -> str:
    return f"Let me think. {'So on and on. ' * 30}It is \\boxed{{{text}}}."


def warm(pool: ProcessPool, one: RolloutGroup) -> None:
    list(pool.score([one]))


def cpu_s(pool: ProcessPool) -> float:
    """Processor time so far of this process and of the judges."""
    judges = psutil.Process(pool._fork_server.pid).children()
    return time.process_time() + sum(sum(judge.cpu_times()[:2]) for judge in judges)


@dataclass(frozen=True)
class Cost:
    """Answers a second by the clock, and processor seconds an answer."""

    rate: float
    cpu_s: float


def pooled(groups: Sequence[RolloutGroup], num_workers: int) -> tuple[Cost, list[RolloutGroup]]:
    pool = ProcessPool(decode, RewardConfig(name="math", num_workers=num_workers))
    for _ in range(3):
        warm(pool, group(0, "1", [boxed(f"\\frac{{{n}x}}{{{n}}}") for n in range(1, 9)]))
    start_s, start_cpu_s = time.monotonic(), cpu_s(pool)
    scored = list(pool.score(groups))
    wall_s, used_s, num = time.monotonic() - start_s, cpu_s(pool) - start_cpu_s, 8 * len(groups)
    pool.close()
    return Cost(rate=num / wall_s, cpu_s=used_s / num), scored


def in_line(scored: Sequence[RolloutGroup]) -> Cost:
    """math-verify itself, one answer after another; its verdicts must be the pool's."""
    MathVerify().warm_up()
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    for one in scored:
        for trajectory, reward in zip(one.trajectories, one.rewards or (), strict=True):
            answer = decode(trajectory.turns[-1])
            gold = math_verify.parse(f"\\boxed{{{one.prompt.label}}}")
            right = math_verify.verify(gold, math_verify.parse(answer))
            assert float(right) == reward.value, (one.prompt.label, answer)
    num = 8 * len(scored)
    return Cost(rate=num / (time.monotonic() - start_s), cpu_s=(time.process_time() - start_cpu_s) / num)


def bench_math(what: str, groups: Sequence[RolloutGroup], num_workers: int = 2) -> tuple[float, float]:
    """Answers a second that the pool's processor time allows on as many idle cores, and that over cores x in line."""
    pool, scored = pooled(groups, num_workers)
    line = in_line(scored[:150])
    possible, share = num_workers / pool.cpu_s, line.cpu_s / pool.cpu_s
    print(
        f"math, {what}: {pool.rate:,.0f} answers/s by {num_workers} processes ({line.rate:,.0f} in line) under today's load;"
        f"\n  processor time an answer {1e6 * pool.cpu_s:,.0f} us, dispatching counted ({1e6 * line.cpu_s:,.0f} us in line):"
        f" {possible:,.0f} answers/s on {num_workers} idle cores, {share:.2f} x cores x in line",
        flush=True,
    )
    return possible, share


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
    _, share = bench_math("expressions, all different", expressions(args.groups // 10))
    possible, _ = bench_math("numbers and fractions", numbers_and_fractions(args.groups))
    ratio = bench_loops(args.limit_s, num_workers=2)
    assert share >= 0.9, f"{share:.2f} x cores x in line, expected at least 0.9"
    assert possible >= 2000, f"{possible:.0f} answers/s, expected 2,000"
    assert ratio <= 1.5, f"{ratio:.2f} x the sum of limits, expected at most 1.5"


if __name__ == "__main__":
    main()
