"""A user's verifier that misbehaves as its response says."""

from __future__ import annotations

import contextlib
import os
import time


def judge(prompt: str, response: str, label: str | None, **extra: object) -> float:
    print("a verifier that prints")
    if response == "loop":
        while True:
            pass
    if response == "sleep":
        time.sleep(1000)
    if response == "fork":
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                time.sleep(1000)
        time.sleep(1000)
    if response == "pause":
        time.sleep(0.2)
        return 1.0
    if response == "nonsense":
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"\0\0\0\0\0\0\0\3abc")
    if response == "leave":
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        return 0.25
    if response == "allocate":
        hoard = []
        while True:
            hoard.append(bytearray(2**24))
    if response == "crash":
        os.abort()
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "nan":
        return float("nan")
    if response == "wander":
        os.chdir("/")
        return 0.5
    if response == "where":
        return 1.0 if os.getcwd() != "/" else 0.0
    return float(response)
