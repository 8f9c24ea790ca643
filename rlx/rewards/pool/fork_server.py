"""The process that judges are forked from: ``python -m rlx.rewards.pool.fork_server FD``.

It imports the verifiers once (seconds) and makes the configured one; each request on the socket FD then forks a judge
within milliseconds, so that killing one costs next to nothing. The pickled RewardConfig comes from stdin. To each request (one
byte with a socket attached) the answer is the judge's process id. It ends when the socket closes.

A judge takes a ``RewardRequest`` from its socket and answers with a ``Reward``. Before it does, it restores
the working directory and kills what the verifier left running.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import signal
import socket
import sys
from pathlib import Path

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier, judge, warm_up
from rlx.rewards.pool.channel import Channel
from rlx.rewards.pool.process_tree import become_subreaper, kill_below
from rlx.rewards.registry import make_verifier


def main(descriptor: int) -> None:
    """Fork judges until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the launcher's to handle
    control = socket.socket(fileno=descriptor)
    births = Channel(control)
    config: RewardConfig = pickle.load(sys.stdin.buffer)
    verifier = make_verifier(config)
    warm_up(verifier)
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
            _judge_until_closed(Channel(socket.socket(fileno=descriptors[0])), verifier, config)
        os.close(descriptors[0])
        births.send(pid)


def _judge_until_closed(channel: Channel, verifier: Verifier, config: RewardConfig) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become_subreaper()
    os.setsid()
    _limit_memory(config.memory_mb)
    _silence()
    home, children = os.getcwd(), os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            reward = judge(verifier, channel.receive(), config.max_abs)
            os.chdir(home)
            _clean_up(children)
            channel.send(reward)
    os._exit(0)


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


def _clean_up(children: int) -> None:
    if os.pread(children, 1, 0):
        kill_below(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
