"""Rollouts on file: written as they come, and given again later without any engine.

A JSONL file with one group a line. Floats are written by ``repr``, so that they come back bit for bit:

    {"step": 3, "prompt_id": 24, "prompt_tokens": [..], "prompt_text": "..", "trajectories": [{"segments": [{"token_ids": [..],
     "rollout_logprobs": [..], "weight_version": 2}], "finish_reason": "stop"}], "rewards": null | [{"value": ..}]}

A trajectory's segments are those after the prompt; given ones have token ids alone. ``messages``, ``images`` and
``reward_parts`` stand there where it has them. Older files have "completions" instead, one answer each:

    {"token_ids": [..], "rollout_logprobs": [..], "weight_versions": [..], "finish_reason": "stop"}

The order of lines is the order in which groups reached the trainer; a replayed run sees the same order.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from rlx.obs.log import logger
from rlx.types.rollout import (
    FinishReason,
    ImageSpan,
    Prompt,
    Reward,
    RolloutGroup,
    SamplingSpec,
    Segment,
    Trajectory,
    given,
    sampled,
)


class RolloutRecorder:
    """Appends groups to ``path``; each line reaches the file in one write.

    An existing file is continued: a torn last line is cut off when it is opened, and the first ``begin_step`` cuts
    off the lines of that step and later ones, which the resumed run writes anew.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the recorder
        self._step: int | None = None
        _cut_torn_line(self._path)

    def begin_step(self, step: int) -> None:
        """Following groups belong to ``step``."""
        if self._step is None:
            self._cut_from(step)
        self._step = step

    def append(self, group: RolloutGroup) -> None:
        """Write one group, with its rewards when it has them. Raises RuntimeError before the first ``begin_step``."""
        if self._step is None:
            raise RuntimeError(f"{self._path}: begin_step must be called before groups are recorded")
        line = json.dumps(_to_json(self._step, group), separators=(",", ":")).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self._path}: a rollout group was written only in part; is the disk full?")

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()

    def _cut_from(self, step: int) -> None:
        offset = 0
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True), start=1):
            if _parse_line(line, f"{self._path}:{number}")["step"] >= step:  # type: ignore[operator]
                logger.warning("%s: recorded rollouts from step %d on are replaced", self._path, step)
                os.truncate(self._path, offset)
                return
            offset += len(line)


class RolloutReplay:
    """A RolloutService that gives recorded groups again, each ``generate`` call the next ``len(prompts)`` of its step.

    The calls must come as they did in the recorded run; ``begin_step`` finds the step's first line (searching forward,
    so that a resumed run can start in the middle). Groups carry the caller's ``Prompt`` and the recorded
    trajectories and rewards.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise ValueError(f"rollout.replay: {self._path} is not a file")
        self._lines = self._path.read_bytes().splitlines()
        self._next = 0
        self._step: int | None = None

    def begin_step(self, step: int) -> None:
        """Go to the first line of ``step`` at or after the present one; ValueError when there is none."""
        self._step = step
        for index in range(self._next, len(self._lines)):
            if self._line(index)["step"] == step:
                self._next = index
                return
        raise ValueError(f"{self._path}: no rollout of step {step} in lines {self._next + 1} to {len(self._lines)}")

    def counts(self) -> Mapping[str, float]:
        return {}

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        """The recorded groups of ``prompts`` in the recorded order. ValueError, raised at once, names file, line and
        step when the file is short or unreadable or holds other prompts, other token ids or another number of samples."""
        if self._step is None:
            raise RuntimeError(f"{self._path}: begin_step must be called before generate")
        wanted = {prompt.prompt_id: prompt for prompt in prompts}
        if len(wanted) != len(prompts):
            raise ValueError(f"step {self._step}: two prompts have the same prompt_id")
        groups: list[RolloutGroup] = []
        for index in range(self._next, self._next + len(prompts)):
            if index >= len(self._lines):
                missing = len(prompts) - len(groups)
                problem = f"the file ends {missing} of {len(prompts)} groups too early"
                raise ValueError(f"{self._path}:{len(self._lines)}: step {self._step}: {problem}")
            groups.append(self._group(index, wanted, sampling))
        self._next += len(prompts)
        return iter(groups)

    def close(self) -> None:
        """Nothing to let go of."""

    def _line(self, index: int) -> Mapping[str, object]:
        return _parse_line(self._lines[index], f"{self._path}:{index + 1}")

    def _group(self, index: int, wanted: dict[int, Prompt], sampling: SamplingSpec) -> RolloutGroup:
        where = f"{self._path}:{index + 1}: step {self._step}"
        row = self._line(index)
        if row["step"] != self._step:
            raise ValueError(f"{where}: the line belongs to step {row['step']}; the recorded step had fewer groups")
        prompt_id = row.get("prompt_id")
        prompt = wanted.pop(prompt_id, None) if isinstance(prompt_id, int) else None
        if prompt is None:
            raise ValueError(f"{where}: recorded prompt {prompt_id!r} is not among those still asked for: {sorted(wanted)}")
        if row.get("prompt_tokens") != list(prompt.token_ids):
            raise ValueError(f"{where}: prompt {prompt_id} has other token ids than recorded (tokenizer, template or data?)")
        try:
            group = _from_json(row, prompt)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: not a rollout group: {type(error).__name__}: {error}") from error
        if len(group.trajectories) != sampling.num_samples:
            raise ValueError(f"{where}: {len(group.trajectories)} samples recorded, {sampling.num_samples} asked for")
        return group


def check_recording(path: str | Path, check_ids: Callable[[Sequence[int]], None], num_rows: int | None = None) -> None:
    """ValueError names file and line of what cannot be replayed: no group, or one with a token that ``check_ids`` refuses. Of a
    long file at most ``num_rows`` lines are read; a torn last line is left to whoever comes that far."""
    num_read = 0
    with Path(path).open("rb") as lines:
        for num_read, line in enumerate(islice(lines, num_rows), start=1):
            if not line.endswith(b"\n"):
                break
            where = f"rollout.replay: {path}:{num_read}"
            row = _parse_line(line, where)
            try:
                prompt = Prompt(prompt_id=0, token_ids=tuple(row["prompt_tokens"]), text="")  # type: ignore[arg-type]
                group = _from_json(row, prompt)
                for ids in (prompt.token_ids, *(s.token_ids for one in group.trajectories for s in one.segments[1:])):
                    check_ids(ids)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{where}: {error if type(error) is ValueError else repr(error)}") from error
    if not num_read:
        raise ValueError(f"rollout.replay: {path} holds no groups")


def _to_json(step: int, group: RolloutGroup) -> dict[str, object]:
    rewards = None if group.rewards is None else [{**asdict(r), "parts": dict(r.parts)} for r in group.rewards]
    return {
        "step": step,
        "prompt_id": group.prompt.prompt_id,
        "prompt_tokens": group.prompt.token_ids,
        "prompt_text": group.prompt.text,
        "trajectories": [_trajectory_row(trajectory) for trajectory in group.trajectories],
        "rewards": rewards,
    }


def _trajectory_row(trajectory: Trajectory) -> dict[str, object]:
    row: dict[str, object] = {
        "segments": [_segment_row(segment) for segment in trajectory.segments[1:]],
        "finish_reason": trajectory.finish_reason,
    }
    more = {
        "messages": list(trajectory.messages),
        "images": [asdict(span) for span in trajectory.images],
        "reward_parts": dict(trajectory.reward_parts),
    }
    return row | {name: value for name, value in more.items() if value}


def _segment_row(segment: Segment) -> dict[str, object]:
    row: dict[str, object] = {"token_ids": segment.token_ids.tolist()}
    if segment.is_sampled:
        row |= {"rollout_logprobs": segment.rollout_logprobs.tolist(), "weight_version": segment.weight_version}
    return row


def _from_json(row: Mapping[str, object], prompt: Prompt) -> RolloutGroup:
    is_old = "completions" in row and "trajectories" not in row
    key = "completions" if is_old else "trajectories"
    trajectories, rewards = row[key], row["rewards"]
    if not isinstance(trajectories, list) or not isinstance(rewards, list | None):
        raise TypeError(f"{key} must be a list, rewards a list or null")
    asked, read = given(prompt.token_ids), _completion if is_old else _trajectory
    return RolloutGroup(
        prompt=prompt,
        trajectories=tuple(read(asked, **each) for each in trajectories),
        rewards=None if rewards is None else tuple(Reward(**each) for each in rewards),
    )


def _trajectory(asked: Segment, *, segments: Sequence[Mapping[str, Any]], finish_reason: str, **more: Any) -> Trajectory:
    more["messages"] = tuple(more.get("messages", ()))
    more["images"] = tuple(_image(**each) for each in more.get("images", ()))
    followed = (_segment(**each) for each in segments)
    return Trajectory(segments=(asked, *followed), finish_reason=_reason(finish_reason), **more)


def _image(*, key: str, start: int, grid: Sequence[int]) -> ImageSpan:
    time, height, width = grid
    return ImageSpan(key=key, start=start, grid=(time, height, width))


def _segment(*, token_ids: Sequence[int], rollout_logprobs: Sequence[float] = (), weight_version: int | None = None) -> Segment:
    return Segment(token_ids=array("i", token_ids), rollout_logprobs=array("d", rollout_logprobs), weight_version=weight_version)


def _completion(
    asked: Segment,
    *,
    token_ids: Sequence[int],
    rollout_logprobs: Sequence[float],
    finish_reason: str,
    weight_versions: Sequence[int],
) -> Trajectory:
    segments = sampled(token_ids, rollout_logprobs, weight_versions)
    return Trajectory(segments=(asked, *segments), finish_reason=_reason(finish_reason))


def _reason(value: str) -> FinishReason:
    if value not in get_args(FinishReason):
        raise ValueError(f"finish_reason is {value!r}")
    return cast(FinishReason, value)


def _parse_line(line: bytes, where: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f'{where}: not a rollout group: expected an object with an integer "step"')
    return row


def _cut_torn_line(path: Path) -> None:
    """Drop what follows the last newline: a process died while it wrote."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: the last line was torn and is cut off", path)
        os.truncate(path, whole)
