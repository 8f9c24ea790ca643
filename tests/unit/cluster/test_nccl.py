"""Trainers and engines load one NCCL, or are told before anything starts which package to change."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from rlx.cluster import doctor
from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config
from rlx.engines import installed, nccl
from rlx.engines.engine_plan import EngineSite, plan_engine
from rlx.rollout.keys import EngineKeys
from tests.sglang.engines import engine_config

OURS, OLDER, NEWER = "2.28.9", "2.27.5", "2.30.7"
PACKAGE = "nvidia-nccl-cu13"


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Makes interpreters of other environments, by what they have; this one's is ``OURS``."""
    here = {"torch": "2.11.0", "nccl": OURS, "file": "/ours/libnccl.so.2", "package": PACKAGE}
    monkeypatch.setattr(installed, "installed", lambda: here)
    nccl.installed_for.cache_clear()

    def make(**found: str) -> str:
        path = tmp_path / f"python-{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\necho some library greets\necho '{json.dumps(found)}'\n" if found else "#!/bin/sh\nexit 3\n")
        path.chmod(0o755)
        return str(path)

    yield make
    nccl.installed_for.cache_clear()


def theirs(version: str) -> dict[str, str]:
    return {"torch": "2.14.1", "sglang": "0.5.23", "nccl": version, "file": "/theirs/libnccl.so.2", "package": PACKAGE}


def test_this_process_loads_the_nccl_that_is_installed() -> None:
    packages = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    found = installed.installed()
    if found.get("package"):
        assert found["nccl"] == packages[found["package"]] and Path(found["file"]).is_file()


def test_the_older_side_is_to_be_brought_up(interpreter: Callable[..., str]) -> None:
    newer, older = interpreter(**theirs(NEWER)), interpreter(**theirs(OLDER))
    fact, advice = nccl.difference(sys.executable, newer)
    assert fact == "trainers load NCCL 2.28.9 (/ours/libnccl.so.2), engines 2.30.7 (/theirs/libnccl.so.2)"
    assert advice.endswith(f"{sys.executable} -m pip install --no-deps {PACKAGE}==2.30.7")
    assert nccl.difference(sys.executable, older)[1].endswith(f"{older} -m pip install --no-deps {PACKAGE}==2.28.9")
    for same in (interpreter(**theirs(OURS)), interpreter(torch="2.14.1", sglang="0.5.23"), sys.executable):
        assert nccl.difference(sys.executable, same) is None
    for broken in (interpreter(), "/nowhere/python"):
        with pytest.raises(ValueError, match=f"{broken} cannot be asked what is installed there"):
            nccl.difference(sys.executable, broken)


@pytest.mark.parametrize("transport", ["auto", "stream", "broadcast", "disk", "shm"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_launcher_looks_before_a_group_of_nccl(
    interpreter: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, device: str
) -> None:
    config = engine_config("sglang", tmp_path, tmp_path)
    config = replace(
        config,
        cluster=ClusterConfig(device=device),
        sync=replace(config.sync, transport=transport),
        rollout=replace(config.rollout, python=interpreter(**theirs(NEWER))),
    )

    def plan(config: Config) -> None:
        env = {"PYTHONPATH": ""}
        site = EngineSite(index=0, run_dir=tmp_path, parent_pipe=0, env=env, keys=EngineKeys(), gpus=("1",))
        plan_engine(EngineSettings.of(config), site)

    if device == "cpu" or transport in ("disk", "shm"):
        plan(config)
        return
    with pytest.raises(ValueError, match=f"rollout.python: trainers load NCCL .*{PACKAGE}==2.30.7; or .* sync.transport=disk"):
        plan(config)
    plan(replace(config, rollout=replace(config.rollout, python=interpreter(**theirs(OURS)))))


def test_the_doctor_compares_both_sides(interpreter: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**there: str) -> dict[str, doctor.Finding]:
        return {finding.subject: finding for finding in doctor._engines(interpreter(**there))}

    apart = found(**theirs(NEWER))
    assert apart["sglang"].status == "ok" and apart["nccl"].status == "note" and f"{PACKAGE}==2.30.7" in apart["nccl"].advice
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert found(**theirs(NEWER))["nccl"].status == "bad" and found(**theirs(OURS))["nccl"].status == "ok"
    assert found()["sglang"].status == "bad" and found(torch="2.14.1")["sglang"].status == "bad"


@pytest.mark.parametrize(
    ("version", "status"), [("0.5.15", "note"), ("0.5.15.post1", "ok"), ("0.5.19", "ok"), ("0.5.24", "note")]
)
def test_the_doctor_knows_the_tested_releases(interpreter: Callable[..., str], version: str, status: str) -> None:
    finding = next(iter(doctor._engines(interpreter(torch="2.14.1", sglang=version))))
    assert finding.status == status and (status == "ok" or "0.5.15.post1 to 0.5.23" in finding.advice)
