"""The process that judges are forked from: ``python -m rlx.rewards.zygote FD``.

It imports the verifiers once (seconds) and makes the configured one; each request on the socket FD then forks a judge
within milliseconds, so that killing one costs next to nothing. Messages, one pickle each: the RewardConfig first; then for
every request (one byte with a socket attached) the answer is the judge's process id. It ends when the socket closes.

A judge takes (number, prompt, response text, completion) from its socket and answers (number, Reward), in order. Before
each it restores the working directory, after each it kills what the verifier left running.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier, invalid, is_finite_number
from rlx.rewards.process_tree import become_subreaper, kill_below
from rlx.rewards.registry import make_verifier
from rlx.types import Completion, Prompt, Reward


def main(descriptor: int) -> None:
    """Fork judges until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the launcher's to handle
    control = socket.socket(fileno=descriptor)
    connection = Connection(os.dup(descriptor))
    config: RewardConfig = connection.recv()
    verifier = make_verifier(config)
    become_subreaper()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects dead judges
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            connection.close()
            _judge_until_closed(Connection(descriptors[0]), verifier, config)
        os.close(descriptors[0])
        connection.send(pid)


def _judge_until_closed(connection: Connection, verifier: Verifier, config: RewardConfig) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become_subreaper()
    os.setsid()
    _limit_memory(config.memory_mb)
    _silence()
    home = Path.cwd()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, prompt, text, completion = connection.recv()
            connection.send((number, judge(verifier, prompt, text, completion)))
            os.chdir(home)
            _clean_up()
    os._exit(0)


def judge(verifier: Verifier, prompt: Prompt, text: str, completion: Completion) -> Reward:
    """The verdict, invalid for whatever the verifier raises or a value that is no finite number."""
    try:
        reward = verifier(prompt, text, completion)
        if reward.valid and not is_finite_number(reward.value):
            return invalid(f"the verifier returned {reward.value!r}, which is not a finite number")
        return reward
    except (Exception, SystemExit) as error:
        # Verifiers are users' code: whatever they raise makes this sample invalid, never the run fail.
        return invalid(f"{type(error).__name__}: {error}")


def _limit_memory(memory_mb: int) -> None:
    """The limit is on addresses, of which the imported libraries take many without using them."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _silence() -> None:
    """What a verifier prints, or reads, is no part of the run."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def _clean_up() -> None:
    if Path(f"/proc/self/task/{os.getpid()}/children").read_text():
        kill_below(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
