"""``rlx serve``: the embedded engine as a process.

Prints one line, ``rlx-serve ready port=PORT``, to standard output once it answers; everything else goes to the log on
standard error. Ends on SIGTERM or SIGINT, answering what is in flight as aborted, and at once when the process at the
other end of ``--parent-pipe`` is gone. Exit status: 0 asked to end, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import uvicorn

from rlx.config.hub.located import model_folder
from rlx.obs.log import log_failure, logger, phase, start_log
from rlx.processes.environment import hide_gpus
from rlx.rollout.embedded.api import Api
from rlx.rollout.embedded.engine import Engine
from rlx.rollout.embedded.keycheck import KeyCheck
from rlx.rollout.embedded.model import LanguageModel
from rlx.rollout.embedded.options import add_options as add_arguments
from rlx.rollout.embedded.protocol import RequestParser
from rlx.rollout.embedded.weights import WeightStore
from rlx.rollout.keys import EngineKeys
from rlx.types.precision import precision_of

_DRAIN_S = 1  # for answers to leave after a signal
_WORKER_END_S = 0.3


def main(args: argparse.Namespace) -> int:
    """Serve until told to end, then end the process; returns the exit status only when it cannot begin."""
    start_log("engine", args.rank)
    hide_gpus(args.device)
    try:
        args.model = model_folder("--model", str(args.model))
        problem = _usage_problem(args)
    except (ValueError, ConnectionError) as error:
        problem = str(error)
    if problem:
        print(f"rlx serve: {problem}", file=sys.stderr)
        return 2
    if args.parent_pipe is not None:
        threading.Thread(target=_watch_parent, args=(args.parent_pipe,), daemon=True).start()
    try:
        listener = _listen(args.host, args.port)
    except OSError as error:
        print(f"rlx serve: cannot listen on {args.host}:{args.port}: {error.strerror}", file=sys.stderr)
        return 1
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with phase("load model"):
        try:
            device = "cuda" if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()) else "cpu"
            model = LanguageModel(args.model, precision_of(args.dtype), device, without_weights=args.await_weights)
            if args.enable_fp32_lm_head:
                model.keep_logits_in_fp32()
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            log_failure(error)
            return 1
    _serve(args, listener, model)


def _usage_problem(args: argparse.Namespace) -> str | None:
    if not (args.model / "config.json").is_file():
        return f"--model {args.model}: no config.json in it; wanted a Hugging Face folder"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: no CUDA device is visible"
    return None


def _serve(args: argparse.Namespace, listener: socket.socket, model: LanguageModel) -> NoReturn:
    engine = Engine(model, args.max_running)
    seeds = random.Random(secrets.randbits(64) if args.seed is None else args.seed)
    parser = RequestParser(model.info, model.tokenizer, lambda: seeds.getrandbits(63))
    api = Api(engine, WeightStore(model, args.weight_timeout_s), parser, args.max_running)
    if args.config is not None:
        api.app.add_middleware(KeyCheck, keys=_read_keys(args.config))
    config = uvicorn.Config(
        api.app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=_DRAIN_S,
        timeout_keep_alive=75,
    )
    server = _Server(config, engine, listener.getsockname()[1])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # uvicorn raises the signal again after its own clean end; by then it has done its work.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    engine.on_failure = server.stop
    engine.start()
    with phase("serve"):
        server.run(sockets=[listener])
    engine.close()
    engine.join(_WORKER_END_S)
    status = 0 if engine.failure is None else 1
    logger.info("ends with status %d", status)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not a return: taking torch down takes seconds, and a thread that waits inside it for a peer would take minutes.
    os._exit(status)


class _Server(uvicorn.Server):
    """uvicorn that says when it is ready and tells the engine when it is to end."""

    def __init__(self, config: uvicorn.Config, engine: Engine, port: int) -> None:
        super().__init__(config)
        self._engine = engine
        self._port = port

    def stop(self) -> None:
        """End soon; may be called from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"rlx-serve ready port={self._port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        # The handler may have interrupted a thread that holds the engine's lock: close from another one.
        threading.Thread(target=self._engine.close, daemon=True).start()


def _read_keys(path: Path) -> EngineKeys:
    content = json.loads(path.read_text())
    return EngineKeys(api_key=content["api-key"], admin_key=content["admin-api-key"])


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(2048)  # also claims the port before the model is loaded
    return listener


def _watch_parent(descriptor: int) -> None:
    """Reads until the parent's end of the pipe closes, which the system does however the parent died."""
    try:
        while os.read(descriptor, 1024):
            pass
    except OSError as error:
        logger.error("--parent-pipe %d cannot be read: %s", descriptor, error)
    logger.error("the parent process is gone: ending")
    os._exit(1)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m rlx.cli.serve", description=__doc__)
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
