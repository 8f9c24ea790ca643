"""A verifier a source, in the pool of its kind; and reasoning-gym's own scorers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlx.config.schema import DataConfig, RewardConfig
from rlx.config.sources import SourceConfig
from rlx.data.questions import read_questions
from rlx.rewards.pool.pools import SplitBySource, make_reward_service
from rlx.rewards.pool.processes import ProcessPool
from rlx.rewards.pool.service import ScoringService
from rlx.rewards.registry import make_verifier
from rlx.types.rollout import Prompt, Reward, RolloutGroup
from tests.trajectories import request, text_group


class Tokenizer:
    """As much of a tokenizer as a text prompt asks for."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def get_vocab(self) -> dict[str, int]:
        return {"a": ord("a")}


class Scorer(BaseHTTPRequestHandler):
    """Scores 100 whatever it is asked."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [100] * len(asked["items"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def group(source: str, *answers: str) -> RolloutGroup:
    return text_group(Prompt(prompt_id=0, token_ids=(1,), text="q", label="7", source=source), *answers)


def verdicts(service: Any, *groups: RolloutGroup) -> list[list[float | str]]:
    found = [[r.value if r.valid else (r.error or "") for r in one.rewards or ()] for one in service.score(groups)]
    service.close()
    return found


def test_each_source_has_its_verifier_and_a_task_its_scorer() -> None:
    prompt = gym_prompt("chain_sum", seed=3)
    args = {"sources": {"sums": {"name": "numeric"}, "task": {"name": "reasoning-gym"}}}
    service = make_reward_service(RewardConfig(name="by_source", args=args), decode)
    assert isinstance(service, ProcessPool)
    task = text_group(prompt, str(prompt.label), "no")
    found = verdicts(service, group("sums", "is 7", "8"), task, group("other", "7"))
    assert found[:2] == [[1.0, 0.0], [1.0, 0.0]]
    assert "no verifier for 'other'" in str(found[2][0])


def test_sources_of_both_kinds_have_a_pool_each(url: str) -> None:
    args = {"sources": {"sums": {"name": "numeric"}, "scored": {"name": "http", "args": {"url": url}}}}
    service = make_reward_service(RewardConfig(name="by_source", num_workers=2, args=args), decode)
    assert isinstance(service, SplitBySource)
    found = verdicts(service, group("sums", "is 7", "8"), group("scored", "a", "b"), group("other", "7"))
    assert found[:2] == [[1.0, 0.0], [100.0, 100.0]]
    assert "no verifier for 'other'" in str(found[2][0])


def test_otherwise_alone_may_be_of_the_other_kind(url: str) -> None:
    args = {"sources": {"sums": {"name": "http", "args": {"url": url}}}, "otherwise": {"name": "numeric"}}
    service = make_reward_service(RewardConfig(name="by_source", args=args), decode)
    assert verdicts(service, group("sums", "7"), group("other", "is 7")) == [[100.0], [1.0]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "by_source needs sources"),
        ({"sources": {"a": {"name": "exact"}}, "else": {}}, "by_source needs sources"),
        ({"sources": {"a": {"nmae": "exact"}}}, r"reward\.args\.sources\.a: expected name"),
        ({"sources": {"a": {"name": "exakt"}}}, "reward.name must be one of"),
        ({"sources": {"a": {"name": "by_source", "args": {"sources": {"b": {"name": "exact"}}}}}}, "cannot stand here"),
        ({"sources": {"a": {"name": "exact"}}, "otherwise": {"name": "exact", "weight": 2}}, r"reward\.args\.otherwise"),
    ],
)
def test_what_does_not_fit_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_verifier(RewardConfig(name="by_source", args=args))


def test_whoever_judges_must_be_given() -> None:
    with pytest.raises(TypeError, match="abstract method 'submit'"):
        ScoringService(decode, RewardConfig(name="exact"))  # type: ignore[abstract]


def gym_prompt(task: str, **args: object) -> Prompt:
    pytest.importorskip("reasoning_gym")
    source = SourceConfig(path=f"reasoning-gym:{task}", args={"size": 1, **args})
    (question,), _ = read_questions(source, DataConfig(), Tokenizer())  # type: ignore[arg-type]
    return question.ask(0, "task")


def judge(prompt: Prompt, response: str, **args: object) -> Reward:
    return make_verifier(RewardConfig(name="reasoning-gym", args=args))(request(prompt, response))


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "basic_arithmetic", "letter_counting", "maze"])
def test_a_tasks_own_scorer_judges(task: str) -> None:
    prompt = gym_prompt(task, seed=3)
    right = str(prompt.label)
    for response in (right, f" {right}\n", f"so <answer>0</answer> no <answer>\n{right}\n</answer>."):
        assert judge(prompt, response).value == 1.0
    assert judge(prompt, "<answer>no</answer>").value < 0.5
    assert judge(prompt, right, tagged_only=True).value == 0.0
    assert judge(prompt, f"<final>{right}</final>", tag="final", tagged_only=True).value == 1.0


def test_any_right_solution_counts_where_there_are_several() -> None:
    prompt = gym_prompt("countdown", seed=3)
    expression = str(prompt.extra["expression"])
    assert judge(prompt, f"<answer>({expression}) + 0 * 1</answer>").value < 1.0  # uses numbers that are not there
    assert judge(prompt, f"<answer>(({expression}))</answer>").value == 1.0


def test_a_prompt_from_elsewhere_has_no_scorer() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="no question of reasoning-gym"):
        judge(Prompt(prompt_id=4, token_ids=(1,), text="q", label="7", source="p.jsonl"), "7")
