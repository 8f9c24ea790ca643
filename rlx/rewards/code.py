"""Programs judged by running them against tests, each in a process of its own.

The program runs with ``python -I`` in an empty folder, without the run's environment, with limits on processor time, memory,
file size and open files, and without network: in a network namespace of its own where the kernel lets us make one
(``network`` "deny" refuses to run where it does not; "try" goes on). This keeps accidents in; it is no jail against an
attacker: run untrusted models on a machine that holds nothing of value.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rlx.rewards.base import MissingLabelError
from rlx.rewards.code_harness import LENGTH_BYTES, WORD_BYTES
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_HARNESS = Path(__file__).with_name("code_harness.py")
MAX_OUTPUT_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTests:
    """The share of tests passed by the last fenced block of the response (``partial`` false: 1 if all pass, else 0).

    Tests stand in the row's column ``tests`` (or in the label as JSON): a list of ``{"input": ..., "output": ...}`` (standard
    input and expected output, outer whitespace of lines ignored) or of Python texts run after the program, which pass
    once they have run to their end (``rlx.rewards.code_harness`` proves it; a program that ends itself passes none).
    ``timeout_s`` is for one test: reward.timeout_s must exceed all of them together.
    """

    tests_key: str = "tests"
    timeout_s: float = 5.0
    memory_mb: int = 512
    partial: bool = False
    network: str = "try"

    def __post_init__(self) -> None:
        if self.network not in ("try", "deny"):
            raise ValueError(f"reward.args.network must be try or deny, got {self.network!r}")

    def __call__(self, request: RewardRequest) -> Reward:
        tests = self._tests_of(request.prompt)
        blocks = _BLOCK.findall(request.response)
        if not blocks:
            return Reward(value=0.0)
        passed = 0
        for test in tests:
            if self._passes(blocks[-1], test):
                passed += 1
            elif not self.partial:
                return Reward(value=0.0)
        return Reward(value=passed / len(tests))

    def check_prompt(self, prompt: Prompt) -> None:
        with contextlib.suppress(MissingLabelError):
            self._tests_of(prompt)

    def _tests_of(self, prompt: Prompt) -> Sequence[object]:
        found = prompt.extra.get(self.tests_key, prompt.label)
        if found is None:
            raise MissingLabelError(f"prompt {prompt.prompt_id} has neither a column {self.tests_key!r} nor a label")
        tests = json.loads(found) if isinstance(found, str) else found
        if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
            raise ValueError(f"prompt {prompt.prompt_id}: tests must be a list with at least one, got {tests!r}")
        return tests

    def _passes(self, program: str, test: object) -> bool:
        if isinstance(test, str):
            return self._holds(program, test)
        if not isinstance(test, Mapping) or "output" not in test:
            raise ValueError(f"a test must be Python text or have input and output, got {test!r}")
        with self._running(program) as run:
            try:
                run.process.communicate(str(test.get("input", "")).encode(), timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                return False
            output = run.output
        return run.process.returncode == 0 and output is not None and _lines(output) == _lines(str(test["output"]))

    def _holds(self, program: str, test: str) -> bool:
        """Whether ``test`` runs to its end after ``program``: each in turn says a word that it can have only then."""
        ours, theirs = socket.socketpair()
        word, proof = secrets.token_bytes(WORD_BYTES), secrets.token_bytes(WORD_BYTES)
        message = test.encode() + proof
        with ours, theirs, self._running(program, theirs) as run:
            theirs.close()
            deadline_s = time.monotonic() + self.timeout_s
            try:
                ours.sendall(word)
                if not _hears(ours, word, deadline_s):
                    return False
                ours.sendall(len(message).to_bytes(LENGTH_BYTES, "big") + message)
                return _hears(ours, proof, deadline_s) and run.output is not None
            except OSError:  # it has ended, or time is up
                return False

    @contextlib.contextmanager
    def _running(self, program: str, channel: socket.socket | None = None) -> Iterator[_Run]:
        """The program in a process of its own, which ends with the context; with ``channel``, under the harness."""
        with tempfile.TemporaryDirectory(prefix="rlx-code-") as folder:
            (Path(folder) / "program.py").write_text(program, encoding="utf-8")
            with tempfile.TemporaryFile() as stream:
                process = subprocess.Popen(
                    [sys.executable, "-I", *(["program.py"] if channel is None else [str(_HARNESS), str(channel.fileno())])],
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8"},
                    stdin=subprocess.PIPE if channel is None else subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.DEVNULL,
                    pass_fds=() if channel is None else (channel.fileno(),),
                    start_new_session=True,
                    preexec_fn=self._confine,
                )
                try:
                    yield _Run(process, stream)
                finally:
                    _kill_session(process)

    def _confine(self) -> None:
        """In the child, between fork and exec."""
        try:
            os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
        except OSError:
            if self.network == "deny":
                raise
        seconds = int(self.timeout_s) + 1
        memory = self.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MAX_OUTPUT_BYTES, 2 * MAX_OUTPUT_BYTES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@dataclass(frozen=True, slots=True)
class _Run:
    """A program that runs, and what it prints."""

    process: subprocess.Popen[bytes]
    stream: IO[bytes]

    @property
    def output(self) -> str | None:
        """What it has printed so far; None if too much."""
        found = os.pread(self.stream.fileno(), MAX_OUTPUT_BYTES + 1, 0)  # the program shares the place where it writes
        return None if len(found) > MAX_OUTPUT_BYTES else found.decode(errors="replace")


def _hears(channel: socket.socket, word: bytes, deadline_s: float) -> bool:
    """Whether exactly ``word`` comes in time."""
    found = b""
    while len(found) < len(word):
        channel.settimeout(max(0.001, deadline_s - time.monotonic()))
        more = channel.recv(len(word) + 1)
        if not more:
            return False
        found += more
    return found == word


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]
