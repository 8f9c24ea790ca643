"""``rlx serve`` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import argparse
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlx.cli import serve
from rlx.obs.log import logger
from tests.unit.rollout_engine.process import start_server


@pytest.fixture
def log_restored() -> Iterator[None]:
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.usefixtures("log_restored")
def test_what_it_refuses_to_start_with(qwen2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        for arguments, status, says in (
            (["--model", str(qwen2_folder), "--port", str(port)], 1, f"127.0.0.1:{port}: Address already in use"),
            (["--model", str(tmp_path / "none")], 2, f"no such folder {tmp_path / 'none'}"),
            (["--model", str(tmp_path)], 2, "no config.json"),
        ):
            assert serve.main(parser.parse_args(arguments)) == status
            out, err = capsys.readouterr()
            assert out == "" and says in err
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--model", str(qwen2_folder), "--max-running", "0"])
    assert "--max-running: must be at least 1, got 0" in capsys.readouterr().err


def test_a_signal_ends_it_at_once_and_answers_what_is_in_flight(qwen2_folder: Path) -> None:
    server = start_server(qwen2_folder, "--rank", "3")
    server.post("/slow_down", {"forward_sleep_time": 0.05})
    sampling = {"max_new_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor() as pool, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        # A group whose other rank never comes must neither stop generation nor hold up the end.
        group = {"master_address": "127.0.0.1", "master_port": nobody.getsockname()[1], "rank_offset": 1, "world_size": 2}
        waiting = pool.submit(server.post, "/init_weights_update_group", {**group, "backend": "gloo"})
        answers = [pool.submit(server.post, "/generate", {"input_ids": [9, i], "sampling_params": sampling}) for i in range(3)]
        time.sleep(0.5)
        assert not waiting.done()
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(2) == 0
        assert time.monotonic() - began < 2
        for answer in answers:
            result = answer.result(1)
            assert result["meta_info"]["finish_reason"]["type"] == "abort" and 0 < len(result["output_ids"]) < 100
        assert waiting.exception(1) is not None
    assert any("engine-3 PHASE" in line for line in server.log)
