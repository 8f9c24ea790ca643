"""What verifiers are given: what the prompt's tail opened, the conversation, the trajectory, the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.config.schema import RewardConfig
from rlx.rewards.base import asks_group, check_prompt
from rlx.rewards.pool.pools import make_reward_service
from rlx.rewards.registry import make_verifier
from rlx.types.rollout import Prompt, RolloutGroup
from tests.trajectories import answered, conversation, request, text_group

THINKING = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
PLAIN = THINKING.removesuffix("<think>\n")


def prompt_of(text: str, **more: object) -> Prompt:
    return Prompt(prompt_id=0, token_ids=(1, 2), text=text, label="4", extra=more)


def ask(name: str, text: str, response: str, **args: object) -> float:
    return make_verifier(RewardConfig(name=name, args=args))(request(prompt_of(text), response)).value


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        (THINKING, "<think>\n"),
        ("Assistant: <think>", "<think>"),
        ("Let me see.\n<my-plan> ", "<my-plan> "),
        (PLAIN, ""),
        (f"{THINKING}\n</think>\n\n", ""),
        ("<start_of_turn>model\n", ""),
        ("<user> 2 + 2? <assistant>", ""),
        ("is 3 < 4>", ""),
        ("", ""),
    ],
)
def test_what_the_tail_of_a_prompt_opened(text: str, opening: str) -> None:
    asked = request(prompt_of(text), "so 4.</think>4")
    assert asked.opening == opening and asked.text == opening + "so 4.</think>4"
    later = request(prompt_of(text), "4", conversation((1, 2), (3,), (4,), (5,)))
    assert later.opening == "", "a later turn does not stand behind the prompt"


@pytest.mark.parametrize(
    ("text", "response", "value"),
    [
        (THINKING, "so 4.</think> <answer>4</answer>", 1.0),
        (PLAIN, "so 4.</think> <answer>4</answer>", 0.0),
        (PLAIN, "<think>so 4.</think> <answer>4</answer>", 1.0),
        (THINKING, "<think>so 4.</think> <answer>4</answer>", 0.0),
        (THINKING, "so 4. <answer>4</answer>", 0.0),
        ("Go on: <answer>", "4</answer>", 0.0),
    ],
)
def test_format_knows_what_was_opened(text: str, response: str, value: float) -> None:
    assert ask("format", text, response) == value


def test_a_pattern_of_ones_own_may_be_that_of_the_response_alone() -> None:
    for pattern in (r"[^<]*</think>\d+", r"<think>.*</think>\d+"):
        assert ask("format", THINKING, "so 4.</think>4", pattern=pattern) == 1.0
    assert ask("regex", THINKING, "so 4.</think>4", pattern=r"^so.*</think>(\d)") == 1.0
    assert ask("regex", THINKING, "so 4.</think>4", pattern=r"<think>\s.*</think>(\d)") == 1.0
    assert ask("regex", PLAIN, "so 4.</think>4", pattern=r"<think>\s.*</think>(\d)") == 0.0


def test_the_conversation() -> None:
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"})
    asked = request(replace(prompt_of(THINKING), messages=chat), "4</think>4")
    assert asked.messages == [*chat, {"role": "assistant", "content": "<think>\n4</think>4"}]
    assert request(prompt_of("2 +"), " 2").messages == [
        {"role": "user", "content": "2 +"},
        {"role": "assistant", "content": " 2"},
    ]
    talk = ({"role": "assistant", "content": "calc"}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"})
    turns = replace(conversation((1, 2), (3,), (4,), (5,), finish_reason="length"), messages=talk)
    later = request(replace(prompt_of(PLAIN), messages=chat), "4", turns)
    assert later.messages == [*chat, *talk] and later.finish_reason == "length"


def test_lengths_are_those_of_all_turns() -> None:
    verifier = make_verifier(RewardConfig(name="length", args={"free": 2, "limit": 4}))
    turns = conversation((1, 2), (3, 3), (4,) * 50, (5,), (6,))
    assert verifier(request(prompt_of(""), "", turns)).value == -0.5


def test_a_model_is_sent_the_whole_trajectory_or_nothing() -> None:
    turns = conversation((1, 2), (3,), (4,), (5,))
    verifier = make_verifier(RewardConfig(name="model", args={"url": "http://127.0.0.1:1", "send_text": True}))
    found = verifier(request(prompt_of("q"), "a", turns))
    assert not found.valid and "reward.args.send_text" in (found.error or "")


FUNCTIONS = """
def asks(prompt, response, label, *, trajectory, messages, finish_reason, group, level=0):
    mine = [answer.response for answer in group if answer.trajectory is trajectory]
    same = sum(answer.response == response for answer in group)
    assert mine == [response] and messages[-1]["content"] == response and finish_reason == "stop"
    assert list(trajectory.token_ids) == [1, *map(ord, response)]
    return float(same), {"level": level, "turns": len(trajectory.turns), "group": len(group)}

def takes_all(prompt, response, label, **columns):
    return float(sorted(columns) == ["group", "level"] and columns["group"] == "algebra")

def by_position(prompt, response, messages):
    return float(messages == "4")

def turns(prompt, response, label, trajectory=None, **columns):
    return float(len(trajectory.turns))
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return f"{tmp_path}/mine.py"


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def test_a_function_gets_what_it_names(functions: str) -> None:
    """In the pool's processes: as it runs."""
    service = make_reward_service(RewardConfig(name=f"{functions}:asks"), decode)
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="q", label="4", extra={"level": 3})
    (scored,) = service.score([text_group(prompt, "a", "b", "a")])
    service.close()
    rewards = scored.rewards or ()
    assert [reward.error for reward in rewards] == [None] * 3
    assert [reward.value for reward in rewards] == [2.0, 1.0, 2.0]
    assert rewards[0].parts == {"level": 3.0, "turns": 1.0, "group": 3.0}


def test_in_a_sum_and_by_source_the_group_is_there_too(functions: str) -> None:
    asking = {"name": f"{functions}:asks"}
    whole = RewardConfig(name="sum", args={"parts": [{"name": "exact"}, asking]})
    sources = RewardConfig(name="by_source", args={"sources": {"a": asking}, "otherwise": {"name": "exact"}})
    assert asks_group(make_verifier(whole)) and asks_group(make_verifier(sources))
    assert not asks_group(make_verifier(RewardConfig(name="exact")))
    assert not asks_group(make_verifier(RewardConfig(name=f"{functions}:turns")))
    service = make_reward_service(whole, decode)
    (scored,) = service.score([text_group(Prompt(prompt_id=0, token_ids=(1,), text="q", label="a"), "a", "a")])
    service.close()
    assert [reward.value for reward in scored.rewards or ()] == [3.0, 3.0]


def test_the_last_turn_is_the_response_and_the_trajectory_comes_whole(functions: str) -> None:
    turns = conversation((1,), (97, 98), (120,) * 3, (99,), (121,))
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="q", label="c")
    for name, value in (("exact", 1.0), (f"{functions}:turns", 2.0)):
        service = make_reward_service(RewardConfig(name=name), decode)
        (scored,) = service.score([RolloutGroup(prompt=prompt, trajectories=(turns,))])
        service.close()
        assert [reward.value for reward in scored.rewards or ()] == [value], name


def test_what_was_called_before_is_called_as_before(functions: str) -> None:
    """Columns of those names still reach a function that takes whatever comes; by position nothing is asked for."""
    prompt = prompt_of("q", group="algebra", level=1)
    for name in ("takes_all", "by_position"):
        verifier = make_verifier(RewardConfig(name=f"{functions}:{name}"))
        asked = prompt if name == "takes_all" else prompt_of("q")
        check_prompt(verifier, asked)
        assert verifier(request(asked, "x")).value == 1.0
        assert not asks_group(verifier)


def test_a_column_called_like_what_a_function_asks_for_is_refused(functions: str) -> None:
    verifier = make_verifier(RewardConfig(name=f"{functions}:asks"))
    check_prompt(verifier, prompt_of("q", level=1))
    with pytest.raises(ValueError, match=r"reward\.name: .*mine\.py:asks has an argument 'group', .* the row has a column"):
        check_prompt(verifier, prompt_of("q", group="algebra"))
    with pytest.raises(ValueError, match=r"cannot be called with this row.* names them also trajectory, messages"):
        check_prompt(verifier, prompt_of("q", colour="red"))
    verifier = make_verifier(RewardConfig(name=f"{functions}:turns", args={"trajectory": 1}))
    with pytest.raises(ValueError, match=r"'trajectory', .* reward\.args has a key of that name"):
        check_prompt(verifier, prompt_of("q"))
    with pytest.raises(ValueError, match="'trajectory'"):
        verifier(request(prompt_of("q"), "x", answered((1, 2), (3,))))
