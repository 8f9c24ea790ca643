"""Scores of a reward model, on both kinds of engines: `/classify` and the reward that asks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from rlx.config.schema import RewardConfig
from rlx.rewards.registry import make_verifier
from rlx.types.rollout import Prompt
from tests.sglang.conftest import KINDS
from tests.sglang.engines import RunningEngine
from tests.sglang.models import make_reward_model, save_reward_model, sequences
from tests.trajectories import answered, request

pytestmark = pytest.mark.timeout(900)  # the first test waits for the engine
TOLERANCE = 1e-5


@torch.no_grad()
def scores(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    return [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scores_are_those_of_transformers(start: Callable[..., RunningEngine], tmp_path: Path, kind: str, family: str) -> None:
    model = make_reward_model(family, 7)
    save_reward_model(model, tmp_path / "rm")
    flags = {"is_embedding": True} if kind == "sglang" else {}
    engine = start(kind, tmp_path / "rm", server_args=flags).wait()
    rows = sequences(21, [1, 2, 42, 90])
    keys = engine.keys.headers("/classify")
    answer = httpx.post(f"{engine.url}/classify", json={"input_ids": rows}, headers=keys, timeout=120, trust_env=False).json()
    assert [row["meta_info"]["prompt_tokens"] for row in answer] == [1, 2, 42, 90]
    assert [row["embedding"] for row in answer] == [[pytest.approx(score, abs=TOLERANCE)] for score in scores(model, rows)]
    one = httpx.post(f"{engine.url}/classify", json={"input_ids": rows[2]}, headers=keys, timeout=120, trust_env=False).json()
    assert one.keys() == answer[0].keys() == {"embedding", "meta_info"}
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert {"id", "prompt_tokens", "weight_version"} <= one["meta_info"].keys()

    key_file = tmp_path / "key"
    key_file.write_text(engine.keys.api_key or "")
    verifier = make_verifier(RewardConfig(name="model", args={"url": engine.url, "api_key_file": str(key_file)}))
    prompt = Prompt(prompt_id=0, token_ids=tuple(rows[1]), text="", label="")
    found = verifier(request(prompt, "", answered(rows[1], rows[2])))
    assert found.value == pytest.approx(scores(model, [rows[1] + rows[2]])[0], abs=TOLERANCE)
    if kind == "sglang":
        return  # its server of scores ends on a request for tokens
    wrong = httpx.post(f"{engine.url}/generate", json={"input_ids": rows[2]}, headers=keys, timeout=120, trust_env=False)
    assert wrong.status_code == 400
