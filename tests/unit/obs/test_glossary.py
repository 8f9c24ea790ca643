"""docs/metrics.md names every metric that the code reports, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from rlx.algos.mismatch import drift, importance_weights
from rlx.config.schema import AlgorithmConfig, RolloutConfig
from rlx.driver.evaluate import summarise
from rlx.driver.ppo import STAT_NAMES, sync_metrics, update_metrics
from rlx.rollout.generate import HttpRolloutService
from rlx.types.rollout import Prompt, Reward, RolloutGroup, UpdateStats
from rlx.types.weights import CanaryReport, WeightManifest
from tests.trajectories import answered

ROOT = Path(__file__).resolve().parents[3]
PLACEHOLDERS = re.compile(r"(?<![A-Z])(SOURCE|PART|REASON|SET|K)(?![A-Z])")
# Where rows are made; what stands elsewhere reads them.
MAKERS = ("driver", "trainer", "data", "parallel", "rollout")
PAIRS = ("loss", "accuracy", "margin", "chosen", "rejected")


@cache
def glossary() -> dict[str, re.Pattern[str]]:
    """Every key of the page, and what it stands for: SOURCE and the like are any name."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    keys = [key for line in text.splitlines() if line.startswith("| `") for key in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    assert len(keys) == len(set(keys)), "a key has two rows"
    return {key: re.compile(PLACEHOLDERS.sub("[^/]+", key).replace("*", "[^/]+")) for key in keys}


def unexplained(keys: Iterable[str]) -> set[str]:
    """Those that the page does not have; a named evaluation set's keys are those of the unnamed one."""
    plain = {re.sub(r"^eval/[^/]+/", "eval/", key) for key in keys}
    return {key for key in plain if not any(pattern.fullmatch(key) for pattern in glossary().values())}


def literals() -> Iterator[str]:
    """Keys that are spelt out in the code that makes rows; what is filled in is shown as *."""
    groups = {key.partition("/")[0] for key in glossary()}
    for path in (path for package in MAKERS for path in (ROOT / "rlx" / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "timer":
                yield f"perf/{ast.literal_eval(node.args[0])}_s"
            text = _text(node) if id(node) not in inside else ""
            group, slash, name = text.partition("/")
            if slash and group in groups and name.replace("*", "") and re.fullmatch(r"[\w@*/]+", name):
                yield text


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def made() -> Iterator[str]:
    """Keys that are put together: asked of the functions that do."""
    nothing, algorithm = torch.zeros(0), AlgorithmConfig()
    yield from (f"mismatch/{name}" for name in drift(nothing, nothing, nothing))
    yield from (f"mismatch/{name}" for name in importance_weights(nothing, nothing, nothing, algorithm)[1])
    canary = CanaryReport(difference=0.0)
    yield from sync_metrics(WeightManifest(version=1, tensors=(), num_bytes=0, seconds=0.0, canary=canary))
    update = UpdateStats(grad_norm=1.0, learning_rate=1.0, skipped=False, means=dict.fromkeys(STAT_NAMES, 0.0))
    yield from (key for role in ("policy", "critic") for key in update_metrics(role, [update]))
    yield from HttpRolloutService(["http://127.0.0.1:1"], RolloutConfig(), vocab_size=9).counts()
    answer = answered((1,), (1,))
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="")
    group = RolloutGroup(prompt=prompt, trajectories=(answer,) * 4, rewards=(Reward(value=1.0, parts={"form": 1.0}),) * 4)
    yield from summarise([group], 4, 1.0, "eval/aime")
    yield from ("loss/train", *(f"rewards/{name}" for name in PAIRS[1:]), *(f"eval/{name}" for name in (*PAIRS, "entropy")))


def test_every_metric_is_explained() -> None:
    assert unexplained({*literals(), *made()}) == set()


def test_every_explanation_is_of_a_metric() -> None:
    keys = {re.sub(r"^eval/[^/]+/", "eval/", key) for key in (*literals(), *made())}
    unused = {key for key, pattern in glossary().items() if not any(pattern.fullmatch(found) for found in keys)}
    # What is dropped has one spelling for all reasons.
    assert unused == {"data/prompt_too_long", "data/prompt_truncated", "drops/REASON"}


@pytest.mark.parametrize("key", ["perf/steps_s", "reward/mean/a/b", "policy/entropie", "evaluation/x"])
def test_an_unknown_metric_is_noticed(key: str) -> None:
    assert unexplained([key]) == {key}
