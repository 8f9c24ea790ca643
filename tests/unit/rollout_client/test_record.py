"""Record and replay: bit for bit, and loud about every mismatch."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.rollout.record import RolloutRecorder, RolloutReplay, check_recording
from rlx.types.rollout import FinishReason, ImageSpan, Prompt, Reward, RolloutGroup, SamplingSpec
from tests.trajectories import answered, conversation

# Lines that hold completions, as they were written before there were trajectories.
OLDER = Path(__file__).with_name("older_recording.jsonl")
SPEC = SamplingSpec(num_samples=2, max_new_tokens=9)


def any_float(rng: random.Random) -> float:
    """A finite double of random bits: every digit matters."""
    while True:
        value = float(struct.unpack("<d", rng.randbytes(8))[0])
        if math.isfinite(value):
            return value


def some_group(rng: random.Random, prompt_id: int, scored: bool = True) -> RolloutGroup:
    prompt = Prompt(
        prompt_id=prompt_id,
        token_ids=tuple(rng.choices(range(50_000), k=rng.randint(1, 7))),
        text="2 + 2 = ? \u2028 \n é",
        label="4",
        extra={"not json": object},
    )
    reasons: list[FinishReason] = ["stop", "length", "abort"]
    trajectories = []
    for _ in range(2):
        count = rng.randint(1, 9)
        trajectories.append(
            answered(
                prompt.token_ids,
                rng.choices(range(50_000), k=count),
                logprobs=[any_float(rng) for _ in range(count)],
                finish_reason=rng.choice(reasons),
                versions=rng.choices(range(9), k=count),
            )
        )
    rewards = (Reward(value=any_float(rng), parts={"a": any_float(rng)}), Reward(value=0.0, valid=False, error="time\nlimit"))
    return RolloutGroup(prompt=prompt, trajectories=tuple(trajectories), rewards=rewards if scored else None)


def write(path: Path, steps: dict[int, list[RolloutGroup]]) -> None:
    recorder = RolloutRecorder(path)
    for step, groups in steps.items():
        recorder.begin_step(step)
        for group in groups:
            recorder.append(group)
    recorder.close()
    recorder.close()


def some_steps(rng: random.Random, *sizes: int) -> dict[int, list[RolloutGroup]]:
    ids = iter(rng.sample(range(1000), sum(sizes)))
    return {step: [some_group(rng, next(ids), scored=step != 1) for _ in range(size)] for step, size in enumerate(sizes)}


def prompts_of(groups: list[RolloutGroup]) -> list[Prompt]:
    return [group.prompt for group in groups]


def test_replay_is_bit_for_bit_in_the_recorded_order(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "deep" / "rollouts.jsonl"
    steps = some_steps(rng, 3, 5, 4)
    write(path, steps)
    assert len(path.read_text().split("\n")) == 13, "one line a group"
    replay = RolloutReplay(path)
    for step, groups in steps.items():
        replay.begin_step(step)
        asked = rng.sample(prompts_of(groups), len(groups))
        assert list(replay.generate(asked, SPEC)) == groups
    replay.close()


def test_several_turns_and_what_came_with_them(tmp_path: Path) -> None:
    turns = conversation((5, 6), (1, 2), (60,), (3,), (61, 62), finish_reason="length")
    talk = ({"role": "tool", "content": "4"}, {"role": "assistant", "content": "é"})
    image = ImageSpan(key="ab" * 32, start=0, grid=(1, 2, 4))
    whole = replace(turns, messages=talk, images=(image,), reward_parts={"found": 0.5})
    group = RolloutGroup(prompt=Prompt(prompt_id=1, token_ids=(5, 6), text=""), trajectories=(turns, whole))
    write(tmp_path / "r", {0: [group]})
    replay = RolloutReplay(tmp_path / "r")
    replay.begin_step(0)
    assert list(replay.generate([group.prompt], SPEC)) == [group]
    check_recording(tmp_path / "r", lambda ids: None)
    seen: list[int] = []
    check_recording(tmp_path / "r", seen.extend)
    assert {*seen} == {5, 6, 1, 2, 60, 3, 61, 62}


def test_an_older_file_is_replayed() -> None:
    replay = RolloutReplay(OLDER)
    prompts = [Prompt(prompt_id=7, token_ids=(5, 6, 9), text=""), Prompt(prompt_id=8, token_ids=(5,), text="")]
    replay.begin_step(1)
    (first,) = replay.generate(prompts[:1], SPEC)
    mixed = answered((5, 6, 9), (11, 12, 2), logprobs=(-0.1234567890123, -2.5e-07, -1.75), versions=(0, 0, 1))
    cut = answered((5, 6, 9), (11,), logprobs=(-3.0000000000000004,), versions=(1,), finish_reason="length")
    assert first.trajectories == (mixed, cut)
    assert first.rewards == (Reward(value=1.0, parts={"form": 0.5}), Reward(value=0.0, valid=False, error="no é"))
    replay.begin_step(2)
    (second,) = replay.generate(prompts[1:], SPEC)
    assert second.rewards is None and second.trajectories[0] == answered((5,), (), finish_reason="abort")
    check_recording(OLDER, lambda ids: None)


def test_two_calls_in_a_step_and_a_start_in_the_middle(tmp_path: Path, rng: random.Random) -> None:
    steps = some_steps(rng, 2, 6, 1)
    write(tmp_path / "r", steps)
    replay = RolloutReplay(tmp_path / "r")
    replay.begin_step(1)
    assert list(replay.generate(prompts_of(steps[1][:4]), SPEC)) == steps[1][:4]
    assert list(replay.generate(prompts_of(steps[1][4:]), SPEC)) == steps[1][4:]
    with pytest.raises(ValueError, match="no rollout of step 9"):
        replay.begin_step(9)


def test_each_line_is_whole_at_once(tmp_path: Path, rng: random.Random) -> None:
    recorder = RolloutRecorder(tmp_path / "r")
    with pytest.raises(RuntimeError, match="begin_step"):
        recorder.append(some_group(rng, 1))
    recorder.begin_step(0)
    for count in range(1, 4):
        recorder.append(some_group(rng, count))
        lines = (tmp_path / "r").read_bytes().split(b"\n")
        assert len(lines) == count + 1 and lines[-1] == b"" and json.loads(lines[-2])["prompt_id"] == count
    recorder.close()


def test_a_resumed_run_writes_its_steps_anew(tmp_path: Path, rng: random.Random) -> None:
    steps = some_steps(rng, 2, 3, 2)
    path = tmp_path / "r"
    write(path, steps)
    with path.open("ab") as file:
        file.write(b'{"step": 2, "prompt_id": 1')  # died while it wrote
    again = {1: [some_group(rng, 5000)], 2: [some_group(rng, 5001)]}
    write(path, again)
    replay = RolloutReplay(path)
    for step, groups in {0: steps[0], **again}.items():
        replay.begin_step(step)
        assert list(replay.generate(prompts_of(groups), SPEC)) == groups
    assert len(path.read_bytes().splitlines()) == 4


def test_a_torn_last_line_is_cut_off(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "r"
    first, then = some_group(rng, 1), some_group(rng, 2)
    write(path, {0: [first]})
    with path.open("ab") as file:
        file.write(path.read_bytes()[:20])
    write(path, {1: [then]})
    replay = RolloutReplay(path)
    for step, group in enumerate([first, then]):
        replay.begin_step(step)
        assert list(replay.generate([group.prompt], SPEC)) == [group]


def test_mismatches_name_file_line_and_step(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "r"
    steps = some_steps(rng, 2, 3)
    write(path, steps)

    def refuse(prompts: list[Prompt], match: str, spec: SamplingSpec = SPEC) -> None:
        replay = RolloutReplay(path)
        replay.begin_step(1)
        with pytest.raises(ValueError, match=match) as caught:
            replay.generate(prompts, spec)
        assert str(caught.value).startswith(f"{path}:") and "step 1" in str(caught.value)

    asked = prompts_of(steps[1])
    stranger = some_group(rng, 7777).prompt
    refuse([*asked, stranger], ":5: .*ends 1 of 4 groups too early")
    refuse([stranger, *asked[1:]], rf":3: .*prompt {asked[0].prompt_id} is not among")
    changed = Prompt(prompt_id=asked[1].prompt_id, token_ids=(*asked[1].token_ids, 1), text="")
    refuse([asked[0], changed, asked[2]], rf":4: .*prompt {changed.prompt_id} has other token ids")
    refuse(asked, ":3: .*2 samples recorded, 5 asked for", SamplingSpec(num_samples=5, max_new_tokens=9))

    replay = RolloutReplay(path)
    replay.begin_step(0)
    with pytest.raises(ValueError, match=":3: step 0: the line belongs to step 1"):
        replay.generate([*prompts_of(steps[0]), asked[0]], SPEC)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda line: line[:-7], "not JSON"),
        (lambda line: b"[1]", "not a rollout group"),
        (lambda line: line.replace(b'"finish_reason"', b'"finish"'), "not a rollout group"),
        (lambda line: line.replace(b'"rollout_logprobs":[', b'"rollout_logprobs":[1,'), "sampled tokens but"),
        (lambda line: line.replace(b'"weight_version":', b'"weight":'), "not a rollout group"),
        (lambda line: line.replace(b'"trajectories":', b'"completions":'), "not a rollout group"),
        (lambda line: line.replace(b'"token_ids":[', b'"token_ids":[99999999999,'), "not a rollout group"),
        (lambda line: line.replace(b'"rewards":', b'"rewarded":'), "not a rollout group"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path: Path, rng: random.Random, spoil: object, match: str) -> None:
    path = tmp_path / "r"
    steps = some_steps(rng, 3)
    write(path, steps)
    lines = path.read_bytes().splitlines()
    assert callable(spoil)
    lines[1] = spoil(lines[1])
    path.write_bytes(b"\n".join(lines) + b"\n")
    replay = RolloutReplay(path)
    replay.begin_step(0)
    with pytest.raises(ValueError, match=match) as caught:
        replay.generate(prompts_of(steps[0]), SPEC)
    assert str(caught.value).startswith(f"{path}:2:")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.replay: .*absent"):
        RolloutReplay(tmp_path / "absent")
