"""Calls in parallel: all results, or all who failed, in time."""

from __future__ import annotations

import threading
import time

import pytest

from rlx.sync.fanout import call_all, failures, start


def test_calls_run_at_once_and_results_keep_their_names():
    meet = threading.Barrier(3, timeout=5)

    def call(value):
        meet.wait()
        return value * 7

    assert call_all({name: lambda v=value: call(v) for value, name in enumerate("abc")}, 5) == {"a": 0, "b": 7, "c": 14}


def test_a_failure_is_reported_at_once_with_those_that_follow():
    release = threading.Event()

    def fail(after_s, text):
        time.sleep(after_s)
        raise OSError(text)

    began = time.monotonic()
    calls = {"hangs": lambda: release.wait(20), "first": lambda: fail(0, "dead"), "second": lambda: fail(0.1, "peer gone")}
    with pytest.raises(RuntimeError, match="first: dead; second: peer gone"):
        call_all(calls, 15)
    assert time.monotonic() - began < 3
    release.set()


def test_the_late_ones_are_named():
    release = threading.Event()
    found = failures({"slow": start(lambda: release.wait(20)), "quick": start(lambda: True)}, 0.2)
    release.set()
    assert list(found) == ["slow"] and isinstance(found["slow"], TimeoutError)
