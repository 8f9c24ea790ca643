"""What counts as a living process."""

import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlx.processes.children import kill_members, living_members

EXIT_ONE_THREAD = {"x86_64": 60, "aarch64": 93}[platform.machine()]
HEADLESS = f"""
import ctypes, threading, time
threading.Thread(target=lambda: time.sleep(60)).start()
ctypes.CDLL(None).syscall({EXIT_ONE_THREAD}, 0)
"""


def test_zombie_with_a_running_thread_is_alive() -> None:
    """Its sockets are still open, so it must not pass for ended."""
    process = subprocess.Popen([sys.executable, "-c", HEADLESS], start_new_session=True)
    try:
        state = ""
        deadline = time.monotonic() + 10
        while state != "Z" and time.monotonic() < deadline:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            time.sleep(0.02)
        assert state == "Z" and process.poll() is None
        assert living_members({process.pid}, None) == [process.pid]
        assert kill_members({process.pid}, None, limit_s=5) == []
        assert process.wait(1) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_ended_but_unreaped_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while living_members({process.pid}, None):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert Path(f"/proc/{process.pid}").exists()
    finally:
        process.wait()
