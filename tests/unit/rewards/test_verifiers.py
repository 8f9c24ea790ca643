"""Each verifier on answers a model may write."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from rlx.config.schema import RewardConfig
from rlx.rewards.base import MissingLabelError
from rlx.rewards.numeric import last_number
from rlx.rewards.pool.pools import make_reward_service
from rlx.rewards.registry import label_use, make_verifier
from rlx.types.rollout import LabelUse, Prompt, Reward, RolloutGroup
from tests.trajectories import answered, request

ANSWER = answered((1,), (1,))


def judge(config: RewardConfig, response: str, label: str | None = "7", **extra: object) -> Reward:
    prompt = Prompt(prompt_id=3, token_ids=(1,), text="the question", label=label, source="p.jsonl", extra=extra)
    return make_verifier(config)(request(prompt, response))


@pytest.mark.parametrize(
    ("args", "response", "label", "value"),
    [
        ({}, "  Paris\n", "Paris", 1.0),
        ({"strip": False}, "Paris\n", "Paris", 0.0),
        ({}, "paris", "Paris", 0.0),
        ({"ignore_case": True}, "STRASSE", "straße", 1.0),
        ({}, "New  York", "New York", 0.0),
        ({"normalize": True}, "New \n York", "New York", 1.0),
        ({"normalize": True}, "ﬁn", "fin", 1.0),
        ({}, "", "", 1.0),
    ],
)
def test_exact(args: dict[str, object], response: str, label: str, value: float) -> None:
    assert judge(RewardConfig(name="exact", args=args), response, label).value == value


@pytest.mark.parametrize(
    ("args", "response", "value"),
    [
        ({"pattern": r"answer is (\d+)"}, "the answer is 7.", 1.0),
        ({"pattern": r"answer is (\d+)"}, "the answer is 70", 0.0),
        ({"pattern": r"(\d+)"}, "7 then 8", 0.0),
        ({"pattern": r"(\d+)", "which": "first"}, "7 then 8", 1.0),
        ({"pattern": r"(a|b): (?P<answer>\S+)"}, "b: 7", 1.0),
        ({"pattern": r"\bseven\b", "ignore_case": True}, "Seven!", 1.0),
        ({"pattern": r"\bseven\b"}, "Seven!", 0.0),
        ({"pattern": r"x(\d)?"}, "x", 0.0),
    ],
)
def test_regex(args: dict[str, object], response: str, value: float) -> None:
    assert judge(RewardConfig(name="regex", args=args), response).value == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7.0),
        ("so 3 + 4 = 7.", 7.0),
        ("-5", -5.0),
        ("−5", -5.0),
        ("+5", 5.0),
        ("= - 5", -5.0),
        ("the answer is -5", -5.0),
        ("-$5", -5.0),
        ("(3)-5", 5.0),
        ("12-5", 5.0),
        ("12 - 5", 5.0),
        ("3.25", 3.25),
        (".5", 0.5),
        ("$1,234,567.50!", 1234567.5),
        ("1, 2, 3", 3.0),
        ("12,34", 34.0),
        ("1/2", 0.5),
        ("-3 / 4", -0.75),
        ("1/0", None),
        ("6.02e23", 6.02e23),
        ("1e999", None),
        ("**42**", 42.0),
        ("\\boxed{42}", 42.0),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    found = last_number(text)
    assert found is None if number is None else found == pytest.approx(number)


def test_numeric_compares_within_tolerance() -> None:
    assert judge(RewardConfig(name="numeric"), "it is 7.0000001").value == 1.0
    assert judge(RewardConfig(name="numeric"), "it is 7.001").value == 0.0
    assert judge(RewardConfig(name="numeric", args={"tolerance": 0.01}), "1012", "1,020").value == 1.0
    assert judge(RewardConfig(name="numeric"), "I do not know").value == 0.0
    assert judge(RewardConfig(name="numeric"), "0.5", "1/2").value == 1.0


def test_a_label_is_needed_where_it_is_compared() -> None:
    for config in (RewardConfig(name="exact"), RewardConfig(name="numeric"), RewardConfig(name="regex", args={"pattern": "(x)"})):
        with pytest.raises(MissingLabelError, match=r"prompt 3 of p\.jsonl has no label"):
            judge(config, "x", label=None)
    assert judge(RewardConfig(name="regex", args={"pattern": "x"}), "x", label=None).value == 1.0
    with pytest.raises(ValueError, match="'seven' of prompt 3 holds no number"):
        judge(RewardConfig(name="numeric"), "7", label="seven")


FUNCTIONS = """
def plain(prompt, response, label, **extra):
    return float(prompt == "the question" and response == label)

def with_parts(prompt, response, label, level, bonus=0.0):
    return level + bonus, {"level": level, "length": len(response)}

def broken(prompt, response, label, **extra):
    return {"nan": float("nan"), "text": "0.5", "none": None, "triple": (1, 2, 3), "part": (1.0, {"x": float("inf")})}[response]
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_python_function(functions: str) -> None:
    assert judge(RewardConfig(name=f"{functions}:plain"), "7") == Reward(value=1.0)
    config = RewardConfig(name=f"{functions}:with_parts", args={"bonus": 0.5})
    assert judge(config, "abc", level=2) == Reward(value=2.5, parts={"level": 2.0, "length": 3.0})
    for response in ("nan", "text", "none", "triple", "part"):
        reward = judge(RewardConfig(name=f"{functions}:broken"), response)
        assert not reward.valid and reward.error and math.isfinite(reward.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig(name="exactly"), "judge, sum, by_source, or path/to/file.py:function; got 'exactly'"),
        (RewardConfig(name="exact", args={"case": True}), "reward.args do not fit the verifier exact"),
        (RewardConfig(name="regex"), "pattern"),
        (RewardConfig(name="regex", args={"pattern": "("}), "is not a regular expression"),
        (RewardConfig(name="regex", args={"pattern": "x", "which": "third"}), "reward.args.which"),
        (RewardConfig(name="numeric", args={"tolerance": -1}), "reward.args.tolerance"),
        (RewardConfig(name="numeric", args={"tolerance": "wide"}), "reward.args"),
        (RewardConfig(name="/nowhere/x.py:f"), "no such file: /nowhere/x.py"),
    ],
)
def test_bad_settings_are_refused_at_once(config: RewardConfig, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_verifier(config)
    assert message in str(caught.value)


def test_bad_files_are_refused_at_once(functions: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no function 'other'"):
        make_verifier(RewardConfig(name=f"{functions}:other"))
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match=r"bad\.py cannot be imported: ModuleNotFoundError"):
        make_verifier(RewardConfig(name=f"{tmp_path}/bad.py:f"))
    (tmp_path / "bad.py").write_text("import os, sys\nos.chdir('/')\nsys.exit(3)")
    home = Path.cwd()
    with pytest.raises(ValueError, match=r"bad\.py cannot be imported: SystemExit: 3"):
        make_verifier(RewardConfig(name=f"{tmp_path}/bad.py:f"))
    assert Path.cwd() == home


def test_which_rewards_need_a_label() -> None:
    parts = RewardConfig(name="sum", args={"parts": [{"name": "format"}, {"name": "math"}]})
    sources = {"a": {"name": "exact"}, "b": {"name": "reasoning-gym"}}
    by_source = RewardConfig(name="by_source", args={"sources": sources, "otherwise": {"name": "numeric"}})
    assert all(label_use(one, "any").is_needed and label_use(one, "any").is_compared for one in (parts, by_source))
    assert label_use(by_source, "a").is_needed and not label_use(by_source, "b").is_needed
    assert label_use(RewardConfig(name="mine.py:f"), "any") == LabelUse(is_handed_on=True)


REWARD_FILE = """
from __future__ import annotations
import dataclasses
import helpers

@dataclasses.dataclass
class Found:
    value: float

def judge(prompt, response, label):
    from more.values import SECOND
    import helpers as again
    return Found(helpers.FIRST + SECOND + again.FIRST).value
"""


def test_a_file_imports_its_neighbours_and_no_namesake_of_theirs(tmp_path: Path) -> None:
    names = []
    for folder, first, second in (("a", 1, 0.5), ("b", 100, 0.25)):
        (tmp_path / folder / "more").mkdir(parents=True)
        (tmp_path / folder / "reward.py").write_text(REWARD_FILE)
        (tmp_path / folder / "helpers.py").write_text(f"FIRST = {first}")
        (tmp_path / folder / "more" / "__init__.py").write_text("")
        (tmp_path / folder / "more" / "values.py").write_text(f"SECOND = {second}")
        names.append(f"{tmp_path}/{folder}/reward.py:judge")
    path, modules = list(sys.path), set(sys.modules)
    parts = [{"name": name, "called": name[-17]} for name in names]
    config = RewardConfig(name="sum", args={"parts": parts})
    verifier = make_verifier(config)
    prompt = Prompt(prompt_id=3, token_ids=(1,), text="", label="")
    assert [verifier(request(prompt, "")).parts for _ in range(2)] == [{"a": 2.5, "b": 200.25}] * 2
    assert sys.path == path and set(sys.modules) == modules
    service = make_reward_service(config, lambda ids: "")
    (scored,) = service.score([RolloutGroup(prompt=prompt, trajectories=(ANSWER,) * 3)])
    service.close()
    assert [reward.value for reward in scored.rewards or ()] == [202.75] * 3


def test_what_a_file_prints_while_it_is_read_is_no_commands_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``rlx check`` prints a configuration and ``rlx reward try`` JSON, for others to read."""
    file = tmp_path / "noisy.py"
    file.write_text("print('model loaded')\ndef reward(prompt, response, label):\n    return 1.0\n")
    make_verifier(RewardConfig(name=f"{file}:reward"))
    out, err = capsys.readouterr()
    assert not out and "model loaded" in err
