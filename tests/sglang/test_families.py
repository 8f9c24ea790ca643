"""From Megatron on TP2 x PP2 ranks into stock SGLang: every tensor bit for bit, every score as transformers has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlx.sync.proof.checksums import Checksums
from tests.dist.launch import ROOT, run_ranks
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import RunningEngine
from tests.sglang.models import save

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(900)]

DENSE = {"tp": 2, "pp": 2, "sequence_parallel": True}
EXPERTS = {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}
TOLERANCE = 1e-5


def checksums(engine: RunningEngine) -> list[dict[str, str]]:
    with closing(engine.control()) as control:
        found = control.checksums()
    assert found is not None, "the engine gives no checksums"
    return found


def calculated(folder: Path, names: Collection[str], tp: int) -> dict[str, list[str]]:
    book = Checksums(names, tp, torch.float32)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            book.add(name, tensor)
    return book.found()


def compare(engine: RunningEngine, folder: Path) -> dict[str, float]:
    """Scores and greedy answers of the engine against transformers on ``folder``, in a process without Megatron."""
    where = {"url": engine.url, "api_key": engine.keys.api_key, "admin_key": engine.keys.admin_key, "folder": str(folder)}
    command = [sys.executable, "-m", "tests.sglang.compare"]
    done = subprocess.run(command, input=json.dumps(where), capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(cases: list[tuple[str, dict, int]], start: Callable[..., RunningEngine], tmp_path: Path) -> None:
    engines: list[RunningEngine] = []
    published: list[dict] = []
    for number, (family, _, tp) in enumerate(cases):
        first = save(family, 50 + number, tmp_path / f"first-{number}")
        engines.append(start("sglang", first, tp=tp).wait())  # one after the other: each is three processes
    for number, ((family, layout, tp), engine) in enumerate(zip(cases, engines, strict=True)):
        weights = save(family, 90 + number, tmp_path / f"new-{number}")
        where = {"url": engine.url, "tp": tp, "api_key": engine.keys.api_key, "admin_key": engine.keys.admin_key}
        what = {"layout": layout, "weights": str(weights), "export": str(tmp_path / f"export-{number}"), "version": 3}
        what["transport"] = {"llama": "broadcast", "qwen2": "ipc", "qwen3_moe": "ipc"}.get(family, "stream")
        published.append(where | what)
    run_ranks("tests.dist.programs.publish", 4, {"cases": published}, tmp_path / "published", timeout_s=500)
    for number, ((family, _, tp), engine) in enumerate(zip(cases, engines, strict=True)):
        export = tmp_path / f"export-{number}"
        ranks = checksums(engine)
        assert len(ranks) == tp
        ours = calculated(export, ranks[0].keys(), tp)
        assert {name: [rank[name] for rank in ranks] for name in ranks[0]} == {name: ours[name] for name in ranks[0]}
        assert set(ours) - set(ranks[0]) <= {"lm_head.weight"}
        found = compare(engine, export)
        print(f"{family} tp={tp}: {len(ranks[0])} checksums, {found}")
        assert found["scores"] < TOLERANCE and found["greedy_logprobs"] < TOLERANCE and found["greedy_tokens"] == 0
        assert found["version"] == 3


def test_llama_and_an_engine_on_two_ranks(start, tmp_path: Path) -> None:
    check([("llama", DENSE, 1), ("qwen2", DENSE, 2)], start, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        [("qwen2", DENSE, 1), ("qwen3", DENSE, 1), ("phi3", DENSE, 1)],
        [("qwen3_moe", EXPERTS, 1), ("mixtral", EXPERTS, 1)],
    ],
    ids=["dense", "experts"],
)
def test_the_other_families(start, tmp_path: Path, cases: list[tuple[str, dict, int]]) -> None:
    check(cases, start, tmp_path)
