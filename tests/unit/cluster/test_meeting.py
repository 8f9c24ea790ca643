"""Ranks wait for the run that rank 0 prepares: as long as it is at work, and no longer."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from rlx.cluster import torchrun
from rlx.processes.environment import Rendezvous
from tests.ports import free_port


@pytest.mark.parametrize("counts", [True, False])
def test_a_long_download_is_waited_for_and_a_rank_that_is_gone_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: bool
) -> None:
    monkeypatch.setattr(torchrun, "MEET_S", 0.3)
    meeting = Rendezvous(address="127.0.0.1", port=free_port(), node=0, ranks_per_node=2, is_hosted=False, attempt="0")
    first = TCPStore("127.0.0.1", meeting.port, is_master=True, wait_for_workers=False)
    other = TCPStore("127.0.0.1", meeting.port, is_master=False)
    (tmp_path / "config.yaml").touch()

    def prepare() -> None:
        with torchrun.at_work(first, meeting):
            time.sleep(1.0)
        first.set("rlx/run/0", json.dumps({"problems": [], "run_dir": str(tmp_path)}))

    if not counts:
        with pytest.raises(RuntimeError):
            torchrun.agreed_run(other, meeting)
        return
    thread = threading.Thread(target=prepare)
    thread.start()
    assert torchrun.agreed_run(other, meeting) == tmp_path
    thread.join()
