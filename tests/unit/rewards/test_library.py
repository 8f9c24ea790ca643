"""math, format, length, code, sums, and the verifiers that ask a server (a real one, on this machine)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import math_verify
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.config.schema import RewardConfig
from rlx.rewards.base import bounded
from rlx.rewards.math import plain_number, same_number
from rlx.rewards.pool.pools import make_reward_service
from rlx.rewards.registry import make_verifier
from rlx.rewards.remote import RemoteError
from rlx.types.rollout import Prompt, Reward, RolloutGroup
from tests.trajectories import answered, request, text_group


def ask(name: str, args: dict[str, Any], response: str, label: str | None = None, num_tokens: int = 4, **extra: object) -> Reward:
    prompt = Prompt(prompt_id=0, token_ids=(1, 2), text="question?", label=label, extra=extra)
    asked = request(prompt, response, answered(prompt.token_ids, (5,) * num_tokens))
    return make_verifier(RewardConfig(name=name, args=args))(asked)


MATH = [
    ("42", r"so \boxed{42}"),
    ("42", r"so \boxed{42.0}"),
    ("1,234", r"so \boxed{1234}"),
    ("42", r"so \boxed{43}"),
    ("0.5", r"\boxed{\frac{1}{2}}"),
    (r"\frac{3}{7}", r"\boxed{\frac{6}{14}}"),
    (r"\frac{3}{7}", r"\boxed{\frac{6}{15}}"),
    (r"\frac{3}{7}", r"\boxed{6/14}"),
    (r"-\frac{1}{2}", r"\boxed{\dfrac{-2}{4}}"),
    ("2", r"\boxed{2.0000001}"),
    ("2", r"\boxed{2.00001}"),
    ("1/3", r"\boxed{0.333333}"),
    ("1/3", r"\boxed{0.33333}"),
    (r"\frac{1}{0}", r"\boxed{\frac{2}{0}}"),
    ("+1,234", r"\boxed{1234.0}"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}"),
    (r"x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"x^2+2x+1", r"\boxed{(x-1)^2}"),
    (r"(1,2)", r"\boxed{(1, 2)}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("12", "the answer is 12"),
    ("12", "the answer is $13$"),
    ("3", "nothing"),
    (r"\boxed{9}", r"it is \boxed{9}"),
    ("5", r"unclosed \boxed{5"),
]


@pytest.mark.parametrize(("label", "response"), MATH)
def test_math_says_what_math_verify_says(label: str, response: str) -> None:
    texts = (label if "boxed" in label else f"\\boxed{{{label}}}", response)
    gold, answer = (math_verify.parse(text, parsing_timeout=None) for text in texts)  # a busy machine passes its limits
    wanted = float(math_verify.verify(gold, answer, timeout_seconds=None))
    assert ask("math", {}, response, label).value == wanted
    if "boxed{" not in response:
        assert ask("math", {"boxed_only": True}, response, label).value == 0.0


_DIGITS = st.integers(0, 40) | st.integers(0, 10**9 - 1)
_DECIMALS = st.builds(lambda whole, rest: f"{whole}.{rest:0>2}", _DIGITS, st.integers(0, 99999))
_FRACTIONS = st.builds(lambda form, a, b: form % (a, b), st.sampled_from([r"\frac{%d}{%d}", r"\dfrac{%d}{%d}", "%d/%d"]),
                       _DIGITS, st.integers(1, 30))  # fmt: skip
_SIGNED = st.builds(lambda sign, text: sign + text, st.sampled_from(["", "-", "+"]), _DECIMALS | _FRACTIONS | _DIGITS.map(str))
_NUMBERS = _SIGNED | _DIGITS.map(lambda number: f"{number:,}")
_STEPS = st.sampled_from(
    [0, 0, 1, Fraction(1, 2), Fraction(1, 10**5), Fraction(3, 10**6), Fraction(1, 10**6), Fraction(1, 10**8)]
)


def _written(value: Fraction, form: int) -> str:
    """``value`` in one of several forms, some of them rounded."""
    if form:
        return f"{float(value):.{form}f}"
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{2 * abs(value.numerator)}}}{{{2 * value.denominator}}}"


@settings(max_examples=150, deadline=None)
@given(_NUMBERS, _STEPS, st.integers(0, 7))
def test_the_short_cut_for_numbers_says_what_math_verify_says(gold: str, step: Fraction, form: int) -> None:
    value = plain_number(gold)
    assert value is not None
    answer = _written(value + step, form)
    found = same_number(gold, answer)
    parsed = [math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    assert found is None or found == math_verify.verify(*parsed, timeout_seconds=None), (gold, answer)


def test_the_last_box_is_the_answer() -> None:
    assert ask("math", {}, r"first \boxed{7}, no: \boxed{-7}", "-7").value == 1.0
    assert ask("math", {}, r"first \boxed{-7}, no: \boxed{7}", "-7").value == 0.0


def test_format_wants_one_thought_and_one_answer() -> None:
    right = "<think>a\nb</think>\n<answer>4</answer>\n"
    wrong = ["4", right + "more", "<think>a</think>", right + right, "<think><think></think><answer></answer>"]
    assert ask("format", {}, right).value == 1.0
    assert [ask("format", {}, text).value for text in wrong] == [0.0] * 5
    assert ask("format", {"pattern": r"\d+"}, "12").value == 1.0
    with pytest.raises(ValueError, match=r"reward\.args\.pattern"):
        ask("format", {"pattern": "("}, "")


def test_length_falls_linearly() -> None:
    args = {"free": 10, "limit": 20, "minimum": 4}
    assert [ask("length", args, "", num_tokens=n).value for n in (1, 4, 10, 15, 20, 30)] == [-0.75, 0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="free < limit"):
        ask("length", {"free": 3, "limit": 3}, "")


def fenced(program: str) -> str:
    return f"Here:\n```python\n{program}\n```\n"


ADD = [{"input": "1 2\n", "output": "3"}, {"input": "5 6\n", "output": "11\n"}]


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", 1.0),
        ("a, b = map(int, input().split())\nprint(3)", 0.5),
        ("raise SystemExit(1)", 0.0),
        ("while True: pass", 0.0),
        ("x = [bytearray(2**24) for _ in range(1000)]", 0.0),
        ("while True: print('x' * 100000)", 0.0),
        ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint(3)", 0.0),
    ],
)
def test_code_is_run_within_its_limits(program: str, wanted: float, server: Any) -> None:
    program = program.replace("PORT", str(server.server_port))
    args = {"partial": True, "timeout_s": 2.0, "memory_mb": 256}
    start_s = time.monotonic()
    assert ask("code", args, fenced(program), tests=ADD).value == wanted
    assert time.monotonic() - start_s < 15


def test_code_takes_assertions_and_refuses_nonsense() -> None:
    tests = json.dumps(["assert f(2) == 4", "assert f(3) == 9"])
    assert ask("code", {}, fenced("def f(x): return x * x"), tests).value == 1.0
    assert ask("code", {}, fenced("def f(x): return x + x"), tests).value == 0.0
    assert ask("code", {}, "no program", tests).value == 0.0
    with pytest.raises(ValueError, match="at least one"):
        ask("code", {}, fenced("x"), "[]")
    with pytest.raises(ValueError, match="neither a column 'tests' nor a label"):
        ask("code", {}, fenced("x"))


WRONG = "def f(x): return 0\n"
RIGHT = "def f(x): return x * x\n"
# Each would pass a test that it never let run to its end.
EARLY = {
    "sys.exit(0)": WRONG + "import sys\nsys.exit(0)",
    "os._exit(0)": WRONG + "import os\nos._exit(0)",
    "quit()": WRONG + "quit()",
    "SystemExit": WRONG + "raise SystemExit",
    "in the function": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "excepthook": WRONG + "import os, sys\nsys.excepthook = lambda *error: os._exit(0)",
    "atexit": WRONG + "import atexit, os\natexit.register(os._exit, 0)",
    "thread": WRONG + "import os, threading\nthreading.Timer(0.01, os._exit, [0]).start()\nimport time\ntime.sleep(1)",
    "fork": WRONG + "import os\nif os.fork(): os._exit(0)",
    "exec": WRONG + "import os\nos.execv('/bin/true', ['true'])",
    "kill": WRONG + "import os, signal\nsignal.signal(15, lambda *a: os._exit(0))\nos.kill(os.getpid(), 15)",
    "dup2": WRONG + "import os\nfor fd in range(3, 64):\n    try: os.dup2(1, fd)\n    except OSError: pass",
    "closing": WRONG + "import os\nos.closerange(3, 64)",
    "a flood": WRONG + "import os\nfor fd in range(64):\n    try: os.write(fd, bytes(64))\n    except OSError: pass\nos._exit(0)",
    "an echo": """
import os, threading, time
def echo(fd):
    try:
        while data := os.read(fd, 10**6): os.write(fd, data)
    except OSError: pass
for fd in range(3, 64): threading.Thread(target=echo, args=(fd,), daemon=True).start()
time.sleep(0.2)
def f(x): return 0""",
    "other builtins": WRONG + "import builtins, os\nbuiltins.exec = builtins.compile = lambda *a, **k: ''\nos.write = print",
    "unreadable": "def f(x: return",
}


@pytest.mark.parametrize("program", EARLY.values(), ids=EARLY.keys())
def test_code_that_ends_before_its_tests_passes_none(program: str) -> None:
    assert ask("code", {"timeout_s": 2.0}, fenced(program), tests=["assert f(2) == 4"]).value == 0.0


def test_code_is_proved_by_tests_that_run_to_their_end() -> None:
    programs = [
        RIGHT,
        RIGHT + "print('x' * 1000)",
        RIGHT + "import atexit, os\natexit.register(os._exit, 1)",
        RIGHT + "import threading\nthreading.Thread(target=input).start()",
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: int\n"
        "def f(x): return pickle.loads(pickle.dumps(A(x))).x ** 2\nassert __name__ == '__main__'",
    ]
    assert [ask("code", {}, fenced(program), tests=["assert f(2) == 4"]).value for program in programs] == [1.0] * 5
    long = [f"data = {'x' * 10**6!r}\nassert len(data) == 10**6 and f(3) == 9", "assert f(2) == 5", "import sys\nsys.exit(0)"]
    assert ask("code", {"partial": True}, fenced(RIGHT), tests=long).value == pytest.approx(1 / 3)
    assert ask("code", {}, fenced(RIGHT + "print('x' * 2**21)"), tests=["assert f(2) == 4"]).value == 0.0
    assert ask("code", {"timeout_s": 0.5}, fenced("def f(x):\n    while True: pass"), tests=["assert f(2) == 4"]).value == 0.0


def test_sums_weigh_their_parts_and_report_each() -> None:
    parts = [
        {"name": "math", "weight": 2.0},
        {"name": "format", "args": {"pattern": ".*boxed.*"}, "weight": 0.5},
        {"name": "length", "args": {"free": 2, "limit": 6}, "weight": 0.25, "called": "short"},
    ]
    found = ask("sum", {"parts": parts}, r"\boxed{3}", "3")
    assert found.value == pytest.approx(2.0 + 0.5 - 0.125)
    assert found.parts == {"math": 1.0, "format": 1.0, "short": -0.5}
    with pytest.raises(ValueError, match="must differ"):
        ask("sum", {"parts": [{"name": "exact"}, {"name": "exact"}]}, "")
    with pytest.raises(ValueError, match="parts"):
        ask("sum", {"parts": [{"nmae": "exact"}]}, "")


class Scorer(BaseHTTPRequestHandler):
    """/score answers the response's length, /classify the sum of ids, /v1/chat/completions a score out of ten."""

    requests: list[Any]
    failures: list[int]
    outputs = 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        if self.failures:
            self.send_error(self.failures.pop())
            return
        if self.path == "/score":
            answer: Any = {"scores": [len(item["response"]) for item in body["items"]]}
        elif self.path == "/classify":
            answer = [{"embedding": [sum(ids), 0.5][: self.outputs]} for ids in body["input_ids"]]
        else:
            text = body["messages"][0]["content"]
            answer = {"choices": [{"message": {"content": "fine. Score: 7" if "good" in text else "no idea"}}]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    Scorer.requests, Scorer.failures = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def group(*answers: str) -> RolloutGroup:
    return text_group(Prompt(prompt_id=3, token_ids=(1,), text="q", label="ab"), *answers)


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_http_gathers_answers_into_requests(server: Any) -> None:
    config = RewardConfig(
        name="http",
        num_workers=8,
        args={"url": f"http://127.0.0.1:{server.server_port}/score", "batch_size": 4, "max_wait_s": 0.3},
    )
    service = make_reward_service(config, decode)
    (scored,) = service.score([group(*("x" * n for n in range(1, 9)))])
    assert [reward.value for reward in scored.rewards or ()] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(Scorer.requests) < 8 and max(len(body["items"]) for body in Scorer.requests) == 4
    service.close()


def test_http_retries_what_may_pass_and_nothing_else(server: Any) -> None:
    args = {"url": f"http://127.0.0.1:{server.server_port}/score", "pause_s": 0.01, "max_retries": 2}
    Scorer.failures[:] = [503, 500]
    assert ask("http", args, "abc").value == 3 and len(Scorer.requests) == 3
    Scorer.failures[:] = [400, 400]
    with pytest.raises(RemoteError, match="HTTP 400"):
        ask("http", args, "abc")
    assert len(Scorer.requests) == 4
    with pytest.raises(ValueError, match=r"reward\.args\.url"):
        ask("http", {"url": "host:80"}, "")


def test_model_and_judge_read_their_servers(server: Any) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    assert ask("model", {"url": url}, "r", num_tokens=3).value == 1 + 2 + 15
    assert ask("judge", {"url": f"{url}/v1", "model": "m"}, "good").value == pytest.approx(0.7)
    lost = ask("judge", {"url": f"{url}/v1", "model": "m"}, "bad")
    assert not lost.valid and "no score" in (lost.error or "")
    with pytest.raises(ValueError, match=r"reward\.args\.template"):
        ask("judge", {"url": url, "model": "m", "template": "{question}"}, "")


def test_one_of_several_outputs_is_named(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not know the kind of reward model answers with hidden states, whose first number is no score."""
    monkeypatch.setattr(Scorer, "outputs", 2)
    args = {"url": f"http://127.0.0.1:{server.server_port}"}
    assert [ask("model", args | {"label_index": index}, "r", num_tokens=3).value for index in (0, 1)] == [18, 0.5]
    with pytest.raises(RemoteError, match=r"answered 2 numbers a sequence, expected one score.*reward\.args\.label_index"):
        ask("model", args, "r", num_tokens=3)


def test_a_sum_of_both_kinds_is_a_chain(server: Any) -> None:
    parts = [
        {"name": "exact", "weight": 10.0},
        {"name": "http", "args": {"url": f"http://127.0.0.1:{server.server_port}/score"}, "weight": 0.5},
    ]
    service = make_reward_service(RewardConfig(name="sum", args={"parts": parts}, max_abs=11), decode)
    found = list(service.score([group("ab", "abc"), group("x")]))
    (huge,) = service.score([group("x" * 30, "ab")])
    service.close()
    assert [reward.error for reward in huge.rewards or ()] == ["http: the reward is 30, beyond reward.max_abs = 11", None]
    assert [[reward.value for reward in one.rewards or ()] for one in found] == [[11.0, 1.5], [0.5]]
    assert (found[0].rewards or ())[0].parts == {"exact": 1.0, "http": 2.0}


def test_a_reward_that_cannot_be_learned_from_is_invalid() -> None:
    parts = [{"name": "exact", "weight": weight, "called": called} for weight, called in ((6e5, "a"), (6e5, "b"))]
    service = make_reward_service(RewardConfig(name="sum", args={"parts": parts}), decode)
    (scored,) = service.score([group("ab", "no")])
    service.close()
    assert [reward.error for reward in scored.rewards or ()] == ["the reward is 1.2e+06, beyond reward.max_abs = 1e+06", None]
    assert (
        bounded(Reward(value=0.5, parts={"n": 1e300}), 1e6).error
        == "the reward's part 'n' is 1e+300, beyond reward.max_abs = 1e+06"
    )
    assert not bounded(Reward(value=1.0, parts={"n": float("nan")}), 1e6).valid
