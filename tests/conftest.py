"""What all tests share: one thread a process, and a fresh seed that a failure shows."""

from __future__ import annotations

import os
import secrets
import signal

import pytest
from hypothesis import settings

# Before torch is imported anywhere: the tests start many processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background jobs ignore Ctrl-C, and those of nohup a closed terminal; so would every process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Tests want a CPU, also where there is a GPU, but for ``pytest -m gpu``. Before torch is imported anywhere."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


settings.register_profile("rlx", deadline=None, max_examples=60)
settings.load_profile("rlx")


@pytest.fixture
def seed() -> int:
    """A fresh random seed; a failing test's output names it, and RLX_TEST_SEED=N brings it back."""
    value = int(os.environ.get("RLX_TEST_SEED", secrets.randbelow(2**31)))
    print(f"RLX_TEST_SEED={value}")
    return value
