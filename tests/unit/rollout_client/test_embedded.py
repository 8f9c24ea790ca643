"""The whole client side against the real embedded engine in a process of its own."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig
from rlx.rollout.generate import HttpRolloutService
from rlx.rollout.server import engine_command, parse_ready_port, wait_until_healthy
from rlx.rollout.sglang.client import EngineClient
from rlx.types.rollout import Prompt, SamplingSpec

VOCAB = 97


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model; large embeddings keep its distributions far from uniform."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def running_engine(config: Config, log: Path) -> Iterator[str]:
    """The engine's url; it ends when this process closes the pipe."""
    read_end, write_end = os.pipe()
    command = engine_command(EngineSettings.of(config), index=0, port=0, python=sys.executable, parent_pipe=read_end)
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, pass_fds=[read_end], text=True)
    os.close(read_end)
    try:
        assert process.stdout is not None
        ports = (parse_ready_port(line) for line in process.stdout)
        port = next((port for port in ports if port is not None), None)
        assert port is not None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, 60, lambda: process.poll() is None, log.read_text)
        yield url
    finally:
        os.close(write_end)
        process.wait(20)


def test_groups_from_a_real_engine(model_dir: Path, rng: random.Random, tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(path=str(model_dir)),
        data=DataConfig(train="none"),
        reward=RewardConfig(name="exact"),
        rollout=RolloutConfig(),
        cluster=ClusterConfig(device="cpu", threads_per_rank=1),
    )
    prompts = [Prompt(prompt_id=n, token_ids=tuple(rng.choices(range(VOCAB), k=rng.randint(1, 11))), text="") for n in range(5)]
    sampling = SamplingSpec(num_samples=3, max_new_tokens=13, temperature=0.8, seed=rng.randrange(2**31))
    with running_engine(config, tmp_path / "engine.log") as url:
        runs = []
        for concurrent in (64, 2):
            service = HttpRolloutService([url], RolloutConfig(max_concurrent_requests=concurrent), VOCAB)
            runs.append({group.prompt.prompt_id: group for group in service.generate(prompts, sampling)})
            service.close()
        scores = asyncio.run(score(url, runs[0][3].trajectories[0].token_ids.tolist()))

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens = [[tuple(one.token_ids) for n in range(5) for one in run[n].trajectories] for run in runs]
    assert tokens[0] == tokens[1], "the same seeds give the same tokens, however requests are batched"
    assert len(set(tokens[0])) > 10, "samples of one prompt differ"
    for group in runs[0].values():
        for one in group.trajectories:
            assert one.num_sampled == 13 and one.finish_reason == "length"
            assert one.weight_versions[-13:].tolist() == [0] * 13 and one.token_ids[:-13].tolist() == list(group.prompt.token_ids)
            wanted = reference(model, one.token_ids.tolist(), 0.8)[-13:]
            torch.testing.assert_close(torch.tensor(one.rollout_logprobs[-13:]), wanted, atol=2e-4, rtol=0)
    wanted = reference(model, runs[0][3].trajectories[0].token_ids.tolist(), 1.0)
    torch.testing.assert_close(torch.tensor(scores), wanted, atol=2e-4, rtol=0)


def reference(model: torch.nn.Module, token_ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probs of tokens 1.. by transformers."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


async def score(url: str, token_ids: list[int]) -> list[float]:
    client = EngineClient(url, 30.0, vocab_size=VOCAB)
    try:
        return await client.score(token_ids)
    finally:
        await client.close()
