"""Publishes a random model to a running SGLang server, in its own format, and times and compares what it writes. Run by
``bench_fp8``.

python -m tests.benchmarks.gpu.fp8 MODEL_DIR URL bf16|fp8 stream|ipc
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from rlx.arch.engine_format import engine_format
from rlx.arch.families.registry import read_architecture
from rlx.config.schema import SyncConfig
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.io import stage_weights
from rlx.parallel.context import shut_down
from rlx.rollout.generate import HttpRolloutService
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.handover import Seats
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.precision import BF16, in_fp8
from rlx.types.rollout import Prompt, SamplingSpec, Trajectory
from tests.benchmarks.gpu.trainer import config_of, one_rank, random_model, randomise

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS, REPEATS, COMPARED = 256, 64, 512, 2, 32
NUM_SYNCS = 4


def generate(service: HttpRolloutService, vocab_size: int, seed: int) -> tuple[float, list[Trajectory]]:
    """Tokens/s, and the answers."""
    draw = random.Random(seed)
    prompts = [
        Prompt(prompt_id=index, token_ids=tuple(draw.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)), text="")
        for index in range(NUM_PROMPTS)
    ]
    began = time.perf_counter()
    groups = list(service.generate(prompts, SamplingSpec(max_new_tokens=NEW_TOKENS)))
    seconds = time.perf_counter() - began
    found = [one for group in groups for one in group.trajectories]
    return sum(one.num_sampled for one in found) / seconds, found


def mismatch(model: RankModel, found: list[Trajectory]) -> float:
    """Mean |difference| of log-probs of sampled tokens, trainer against engine."""
    chosen = found[:COMPARED]
    scores = score_sequences(model, [list(one.token_ids) for one in chosen], 8192)
    return mean(
        abs(ours - theirs)
        for one, row in zip(chosen, scores, strict=True)
        for ours, theirs, is_sampled in zip(row, one.rollout_logprobs[1:], one.loss_mask[1:], strict=True)
        if is_sampled
    )


def main(model_dir: Path, url: str, name: str, transport: str) -> None:
    context = one_rank()
    arch = read_architecture(model_dir)
    chunks = random_model(model_dir, context)
    beside = Companions.of(model_dir)
    model = RankModel(arch=arch, chunks=chunks, head=token_head(context, arch), context=context, companions=beside)
    wanted = engine_format(arch, fp8=name == "fp8")
    target = PublisherTarget(
        endpoints=(Endpoint(url=url),),
        expected=wanted.shapes,
        fp8=wanted.converted,
        backend="nccl",
        device=context.device,
        transport=transport,
        seats=Seats(by_engine={0: [0]}, weight_bytes=2),
    )
    canary = CanarySpec(
        vocab_size=arch.vocab_size,
        seed=0,
        precision=in_fp8(BF16) if wanted.converted else BF16,
        score_on_trainer=lambda rows, images: score_sequences(model, rows, 8192, images),
    )
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    config = SyncConfig(canary_first=1, canary_every=0, timeout_s=120)
    publisher = Publisher(place, target, config, context.gather_objects, canary)
    result: dict[str, object] = {}
    times = []
    for version in range(1, NUM_SYNCS + 1):
        randomise(chunks, version)
        torch.cuda.synchronize()
        manifest = publisher.publish(version, stage_weights(chunks, arch, context, everywhere=transport == "ipc"))
        print(name, version, round(manifest.seconds * 1e3, 1), "ms", manifest.canary or "", flush=True)
        times.append(manifest.seconds)
        if manifest.canary is not None:
            result |= {"canary": manifest.canary.difference, "num_proved": manifest.canary.num_proved}
    result |= {"sync_ms": round(min(times[1:]) * 1e3, 1), "sync_gb": round(manifest.num_bytes / 1e9, 2)}
    publisher.close()
    service = HttpRolloutService([url], config_of(model_dir).rollout, arch.vocab_size)
    generate(service, arch.vocab_size, 0)
    rates = [generate(service, arch.vocab_size, seed) for seed in range(1, REPEATS + 1)]
    service.close()
    result["tokens_s"] = round(max(rate for rate, _ in rates))
    result["mismatch/logprob_abs_mean"] = round(mismatch(model, rates[-1][1]), 5)
    print("RESULT", json.dumps({name: result}), flush=True)
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
