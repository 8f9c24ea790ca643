"""Stands in for an interpreter that runs ``-m sglang.launch_server``: the processes of one engine meet, rank 0 serves health.

DUMMY_SPAN in the environment: ``deaf``: nobody notices when another one ends; ``fails RANK``: that rank raises at once.
"""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time


def main() -> None:
    words = sys.argv[1:]
    value = {name: words[words.index(f"--{name}") + 1] for name in ("port", "nnodes", "node-rank", "dist-init-addr")}
    rank, behaviour = int(value["node-rank"]), os.environ.get("DUMMY_SPAN", "")
    print("devices", os.environ["CUDA_VISIBLE_DEVICES"])
    subprocess.Popen(["sleep", "600"])
    if behaviour == f"fails {rank}":
        raise MemoryError("no room for the weights")
    host, _, port = value["dist-init-addr"].partition(":")
    address = (host, int(port))
    peers = wait_for_peers(address, int(value["nnodes"]) - 1) if rank == 0 else [connect(address)]
    for peer in peers:
        threading.Thread(target=watch, args=(peer, behaviour == "deaf")).start()
    print("met at", value["dist-init-addr"])
    http.server.ThreadingHTTPServer((host, int(value["port"])), Health).serve_forever()


def wait_for_peers(address: tuple[str, int], count: int) -> list[socket.socket]:
    with socket.socket() as server:
        server.bind(address)
        server.listen()
        return [server.accept()[0] for _ in range(count)]


def connect(address: tuple[str, int]) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address)
        except ConnectionRefusedError:
            time.sleep(0.02)


def watch(peer: socket.socket, is_deaf: bool) -> None:
    with contextlib.suppress(ConnectionResetError):
        peer.recv(1)
    if not is_deaf:
        print("RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        os._exit(1)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Leave the log to the lines that the tests look for."""


if __name__ == "__main__":
    main()
