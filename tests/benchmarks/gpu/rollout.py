"""Tokens/s of rlx's rollout client against one batched ``/generate`` with the same prompts. Run by ``bench_gpu``.

python -m tests.benchmarks.gpu.rollout MODEL_DIR URL
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import httpx

from rlx.arch.families.registry import read_architecture
from rlx.rollout.generate import HttpRolloutService
from rlx.types.rollout import Prompt, SamplingSpec
from tests.benchmarks.gpu.trainer import config_of

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 64, 256, 3


def main(model_dir: Path, url: str) -> None:
    vocab_size = read_architecture(model_dir).vocab_size
    service = HttpRolloutService([url], config_of(model_dir).rollout, vocab_size)
    found = {"client": [], "batched": []}  # type: dict[str, list[float]]
    for attempt in range(REPEATS + 1):
        draw = random.Random(attempt)
        prompts = [[draw.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]
        began = time.perf_counter()
        sampling = SamplingSpec(max_new_tokens=NEW_TOKENS)
        asked = [Prompt(prompt_id=index, token_ids=tuple(ids), text="") for index, ids in enumerate(prompts)]
        groups = list(service.generate(asked, sampling))
        num_tokens = sum(one.num_sampled for group in groups for one in group.trajectories)
        found["client"].append(num_tokens / (time.perf_counter() - began))
        for ids in prompts:
            ids[0] = draw.randrange(2, vocab_size)  # no prompt of the first half is cached
        body = {
            "input_ids": prompts,
            "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 1.0},
            "return_logprob": True,
        }
        began = time.perf_counter()
        answers = httpx.post(f"{url}/generate", json=body, timeout=120, trust_env=False).json()
        num_tokens = sum(len(answer["output_ids"]) for answer in answers)
        found["batched"].append(num_tokens / (time.perf_counter() - began))
        print(attempt, {name: round(rates[-1]) for name, rates in found.items()}, flush=True)
    service.close()
    best = {name: max(rates[1:]) for name, rates in found.items()}
    result = {f"rollout/{name}_tokens_s": round(rate) for name, rate in best.items()}
    print("RESULT", json.dumps(result | {"rollout/ratio": round(best["client"] / best["batched"], 3)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
