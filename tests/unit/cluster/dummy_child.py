"""A small stand-in for a trainer rank, the driver or an engine: real process, real sockets, no model.

    dummy_child.py trainer RUN_DIR ENDPOINTS_FILE PARENT_PIPE RANK_TO_BEHAVIOUR_JSON
    dummy_child.py driver PARENT_PIPE RANK_TO_BEHAVIOUR_JSON STOP_FILE      (done when rank 0 is to be done)
    dummy_child.py engine PARENT_PIPE BEHAVIOUR      ("once": healthy in its first life only)

Rank 0 listens on MASTER_PORT and every other rank stays connected to it: when one goes, the others notice.
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlx.obs.log import log_failure, phase, start_log
from rlx.processes.parent_watch import watch_parent

LISTENER = """
import socket, sys, time, pathlib
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
pathlib.Path(sys.argv[1]).write_text(str(s.getsockname()[1]))
time.sleep(600)
"""


def start_grandchildren(run_dir: Path) -> None:
    """One in our process group, one in a session of its own; both listen on a port."""
    for name, own_session in (("inner", False), ("outer", True)):
        subprocess.Popen([sys.executable, "-c", LISTENER, str(run_dir / f"{name}.port")], start_new_session=own_session)
    while not all((run_dir / f"{name}.port").exists() for name in ("inner", "outer")):
        time.sleep(0.01)


def connect_ranks(rank: int, world_size: int) -> list[socket.socket]:
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.socket() as server:
            server.bind(address)
            server.listen()
            return [server.accept()[0] for _ in range(world_size - 1)]
    while True:
        try:
            return [socket.create_connection(address)]
        except ConnectionRefusedError:
            time.sleep(0.02)


def check_peers(peers: list[socket.socket]) -> None:
    for peer in peers:
        peer.setblocking(False)
        try:
            if peer.recv(1) == b"":
                raise RuntimeError(f"[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:{os.getpid()}")
        except BlockingIOError:
            continue


def train(run_dir: Path, endpoints_file: Path, behaviour: str, rank: int, world_size: int) -> None:
    words = behaviour.split()
    with phase("connect"):
        peers = connect_ranks(rank, world_size)
    if "grandchildren" in words:
        start_grandchildren(run_dir)
    if "stubborn" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with phase("wait for engines"):
        while not endpoints_file.exists():
            time.sleep(0.02)
        json.loads(endpoints_file.read_text())
    act, at = words[0], int(words[1])
    for step in range(10_000):
        with phase("update policy", step=step):
            time.sleep(0.1)
            if step == at:
                if act == "done":
                    return
                if act == "raise":
                    raise ValueError('odd "shape"\nsecond line')
                if act == "exit":
                    sys.exit(7)
                os.kill(os.getpid(), signal.SIGKILL)
            if any(run_dir.glob(".stop-*")):
                return
            check_peers(peers)
        if rank == 0:
            row = {"step": step, "reward/mean": step / 10, "kl/ref": 0.01, "perf/step_s": 0.1, "perf/tokens_per_s": 50.0}
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def drive(behaviour: str, stop_file: Path) -> None:
    act, at = behaviour.split()[:2]
    for step in range(int(at) + 1 if act == "done" else 10_000):
        with phase("update policy", step=step):
            time.sleep(0.1)
        if stop_file.exists():
            sys.exit(75)


def serve(behaviour: str) -> None:
    # Its output is its log, which all its lives share.
    unhealthy = behaviour == "unhealthy" or (behaviour == "once" and os.fstat(1).st_size > 0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if unhealthy else 200)
            self.end_headers()

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Leave the log to the lines that the tests look for."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print("loading dummy weights of 17 tensors")
    if behaviour != "silent":
        print(f"rlx-serve ready port={server.server_port}")
    if behaviour.startswith("exit"):
        threading.Timer(float(behaviour.split()[1]), lambda: os._exit(0)).start()
    server.serve_forever()


def main() -> None:
    if sys.argv[1] == "engine":
        start_log("engine", 0)
        watch_parent(int(sys.argv[2]))
        serve(sys.argv[3])
        return
    if sys.argv[1] == "driver":
        start_log("driver", 0)
        if "deaf" not in sys.argv[3]:
            watch_parent(int(sys.argv[2]))
        drive(json.loads(sys.argv[3])["0"], Path(sys.argv[4]))
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_log("trainer", rank)
    if "deaf" not in sys.argv[5]:
        watch_parent(int(sys.argv[4]))
    try:
        train(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[5])[str(rank)], rank, world_size)
    except Exception as error:
        log_failure(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
