"""Every trainer rank hands the whole model to the engine on its device, whatever the layout: two engines, fresh weights each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlx.rollout.sglang.control import EngineControl
from tests.dist.launch import run_ranks
from tests.dist.sync_lab import start_engines
from tests.sglang.models import make, save, scores

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {},
    "TP2+SP": {"tp": 2, "sequence_parallel": True},
    "TP4, a key-value head for two ranks": {"tp": 4},
    "PP4": {"pp": 4},
    "PP2 x VPP2 x CP2": {"pp": 2, "vpp": 2, "cp": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
}
TOKENS = [3, 130, 7, 7, 0, 64, 21, 99, 5]


def test_every_layout_hands_over_the_same_model(tmp_path: Path) -> None:
    engines = start_engines(tmp_path, 2, make("qwen2", 1))
    try:
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            weights = save("qwen2", 60 + number, tmp_path / f"new-{number}")
            case = {
                "layout": layout,
                "weights": str(weights),
                "urls": [engine.url for engine in engines],
                "tp": 1,
                "api_key": None,
                "admin_key": None,
                "version": 2 * number + 2,
                "export": str(tmp_path / f"export-{number}"),
                "transport": "ipc",
            }
            run_ranks("tests.dist.programs.publish", 4, {"cases": [case]}, tmp_path / f"published-{number}", timeout_s=200)
            for engine in engines:
                control = EngineControl(engine.url, timeout_s=30)
                assert control.weight_version() == str(case["version"]), name
                wanted = scores(make("qwen2", 60 + number), TOKENS)
                worst = max(abs(ours - theirs) for ours, theirs in zip(control.score(TOKENS), wanted, strict=True))
                control.close()
                assert worst < 2e-5, f"{name}: {worst}"
    finally:
        for engine in engines:
            engine.stop()
