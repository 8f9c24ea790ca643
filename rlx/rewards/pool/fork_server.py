"""The process that judges are forked from: ``python -m rlx.rewards.pool.fork_server FD``.

It imports the verifiers once (seconds) and makes the configured one; each request on the socket FD then forks a judge
within milliseconds, so that killing one costs next to nothing. Messages of a ``Channel``: the RewardConfig first; then for
every request (one byte with a socket and a stopwatch's page attached) the answer is the judge's process id. It ends when the
socket closes.

A judge takes lists of (number, prompt, response text, completion) from its socket and answers with ``Verdicts``, in order,
noting on the stopwatch which answer it is at. After each it restores the working directory and kills what the verifier left
running.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier, judge, warm_up
from rlx.rewards.pool.channel import Channel, Verdicts
from rlx.rewards.pool.process_tree import become_subreaper, kill_below
from rlx.rewards.pool.stopwatch import NOTHING, Stopwatch
from rlx.rewards.registry import make_verifier

# Verdicts are kept back no longer than this while more answers of the same message are judged.
_KEEP_S = 0.005


def main(descriptor: int) -> None:
    """Fork judges until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the launcher's to handle
    control = socket.socket(fileno=descriptor)
    births = Channel(control)
    config: RewardConfig = births.receive()
    verifier = make_verifier(config)
    warm_up(verifier)
    become_subreaper()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects dead judges
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            channel, stopwatch = Channel(socket.socket(fileno=descriptors[0])), Stopwatch(descriptors[1])
            _judge_until_closed(channel, stopwatch, verifier, config)
        for received in descriptors:
            os.close(received)
        births.send(pid)


def _judge_until_closed(channel: Channel, stopwatch: Stopwatch, verifier: Verifier, config: RewardConfig) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become_subreaper()
    os.setsid()
    _limit_memory(config.memory_mb)
    _silence()
    home, children = os.getcwd(), os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            rewards, written_s = [], time.monotonic()
            for number, prompt, text, completion in channel.receive():
                stopwatch.start(number)
                rewards.append((number, judge(verifier, prompt, text, completion, config.max_abs)))
                os.chdir(home)
                _clean_up(children)
                if time.monotonic() - written_s >= _KEEP_S:
                    channel.send(Verdicts(rewards=rewards, seconds=time.monotonic() - written_s))
                    rewards, written_s = [], time.monotonic()
            stopwatch.start(NOTHING)
            if rewards:
                channel.send(Verdicts(rewards=rewards, seconds=time.monotonic() - written_s))
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
