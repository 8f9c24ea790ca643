"""One rank of ``tests.benchmarks.gpu.vision``: what is measured and how. Imported once the rank has its device."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from rlx.arch.vision import Vision
from rlx.config.schema import (
    AlgorithmConfig,
    BatchingConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rlx.data.images import pixels as canonical
from rlx.data.plan import Budget, plan_batch
from rlx.parallel.context import ParallelContext
from rlx.trainer import rank_model
from rlx.trainer.worker import Worker
from rlx.types.rollout import ImageSpan
from tests.batches import part_for
from tests.benchmarks.gpu.pictures import GROUP, Size, make_samples
from tests.benchmarks.gpu.trainer import randomise
from tests.benchmarks.gpu.update import PEAK_FLOPS, profile

WARM_UPS, REPEATS = 2, 5
# What a loop over windows is called with: transformers' own path for kernels that know no borders.
LOOP = "sdpa"


def config_of(out: Path, args: argparse.Namespace) -> Config:
    return Config(
        run=RunConfig(dir=str(out / "run")),
        model=ModelConfig(path=str(out / "model"), dtype=args.dtype, recompute=args.recompute, vision=args.part),
        data=DataConfig(train="none"),
        parallel=ParallelConfig(tp=args.tp, sequence_parallel=args.tp > 1),
        reward=RewardConfig(name="numeric"),
        algorithm=AlgorithmConfig(name="grpo"),
        rollout=RolloutConfig(dtype=args.dtype),
        batching=BatchingConfig(max_tokens_per_micro_batch=args.tokens),
    )


class Bench:
    """One rank of one part."""

    def __init__(self, args: argparse.Namespace, size: Size, context: ParallelContext) -> None:
        self.args, self.size, self.context = args, size, context
        self.config = config_of(args.out, args)
        self.keys: list[str] = json.loads((args.out / "keys.json").read_text())
        self.on_gpu = context.device.type == "cuda"
        # Nothing is read: every tensor-parallel rank draws the same numbers, which is what copies need.
        with mock.patch.object(rank_model, "load_weights", lambda chunks, *_: randomise(chunks, 0)):
            self.worker = Worker(self.config, context)
        vision = self.worker.policy.arch.vision
        assert vision is not None
        self.vision = vision
        self.flops_of_patch = flops_of_patch(vision, size, self.worker.policy.arch.hidden_size)

    def say(self, name: str, told: object) -> None:
        """One result, printed at once: what comes later may fail."""
        if self.context.rank == 0:
            layout = f"{self.size.shape} TP{self.args.tp}, recompute {self.args.recompute}, {self.args.part}"
            print("RESULT", json.dumps({f"vision/{layout}: {name}": told}), flush=True)

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def median_ms(self, work: Callable[[], Any], prepare: Callable[[], None] = lambda: None) -> float:
        """``prepare`` comes before each of them and is not timed."""
        times = []
        for _ in range(WARM_UPS + REPEATS):
            prepare()
            self.synchronise()
            self.context.barrier()
            began = time.perf_counter()
            work()
            self.synchronise()
            times.append((time.perf_counter() - began) * 1e3)
        return round(statistics.median(times[WARM_UPS:]), 1)

    # Updates

    def load(self, keys: Sequence[str] | None) -> None:
        """A batch that was scored and has its advantages."""
        samples = make_samples(self.vision, self.size, keys)
        lengths = [len(sample) for sample in samples]
        budget = Budget.of(self.config.model, self.config.parallel, self.config.batching)
        load = budget.load_of([[length] for length in lengths], [sample.images for sample in samples])
        counts = [self.size.answer] * len(samples)
        plan = plan_batch(lengths, counts, dims=self.context.dims, num_mini_batches=1, max_tokens=self.args.tokens, load=load)
        self.worker.load_batch(part_for(samples, plan))
        self.worker.score_policy()
        self.worker.compute_advantages(0.0)

    def update(self) -> None:
        self.worker.update_policy(0)

    def forget_features(self) -> None:
        """As in a batch that no pass has seen."""
        self.worker.batch._kept_features.clear()

    def forget_pictures(self) -> None:
        self.forget_features()
        canonical._decoded.cache_clear()

    def updates(self) -> None:
        """Batches of as many tokens: text alone, an image that a group shares, an image of each sequence's own."""
        self.load(None)
        self.reset_peak()
        text_ms = self.median_ms(self.update)
        self.say("update of text alone", {"ms": text_ms, "tokens": sum(map(len, self.worker.batch.samples))} | self.peak())
        shared = [self.keys[index // GROUP * GROUP] for index in range(self.size.num_sequences)]
        for name, keys in {f"an image for {GROUP} sequences": shared, "an image for each sequence": self.keys}.items():
            self.load(keys)
            self.reset_peak()
            found: dict[str, float] = {"images": len(set(keys))}
            found["update_ms"] = self.median_ms(self.update)
            found["ratio"] = round(found["update_ms"] / text_ms, 3)
            prepare = {"fresh": self.forget_features, "fresh_with_decoding": self.forget_pictures}
            for kind, forget in prepare.items() if self.args.part == "frozen" else ():
                found[f"{kind}_ms"] = self.median_ms(self.update, forget)
                found[f"{kind}_ratio"] = round(found[f"{kind}_ms"] / text_ms, 3)
            self.say(name, found | self.peak())
        if self.args.profile and self.on_gpu:
            self.forget_features()
            profile(self.update)

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """Of the rank that has most."""
        mine = torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0
        return {"peak_gib": round(max(self.context.gather_objects(mine)), 1)}

    # The tower by itself

    def patches(self, keys: Sequence[str]) -> NDArray[np.float32]:
        folder, grid = canonical.image_folder(self.config.run.dir), self.size.grid(self.vision)
        spans = [ImageSpan(key=key, start=0, grid=grid) for key in keys]
        return np.concatenate([canonical.pixels(canonical.image_file(folder, s.key), s, self.vision) for s in spans])

    @torch.no_grad()
    def tower(self) -> None:
        """One kernel call for all windows of all images, against a call for each window."""
        keys = self.keys[: self.size.tower_images]
        pictures = {
            "decoded_and_cut_ms": self.median_ms(lambda: self.patches(keys), canonical._decoded.cache_clear),
            "cut_ms": self.median_ms(lambda: self.patches(keys)),
        }
        self.say("pictures on the CPU, an image", {name: round(ms / len(keys), 2) for name, ms in pictures.items()})
        tower: Any = self.worker.policy.chunks[0].vision
        usual = tower.config._attn_implementation
        for count in (1, len(keys)):
            patches = torch.from_numpy(self.patches(keys[:count])).to(self.context.device)
            grids = torch.tensor([self.size.grid(self.vision)] * count, device=self.context.device)

            def run(patches: torch.Tensor = patches, grids: torch.Tensor = grids) -> torch.Tensor:
                features: torch.Tensor = tower(patches, grid_thw=grids).pooler_output
                return features

            found: dict[str, float] = {"patches": len(patches)}
            features = {}
            for name, attention in {"one_call": usual, "loop": LOOP}.items():
                tower.config._attn_implementation = attention
                features[name] = run().float()
                found[f"{name}_ms"] = self.median_ms(run)
                per_s = len(patches) / found[f"{name}_ms"] * 1e3
                found[f"{name}_patches_per_s"] = round(per_s)
                found[f"{name}_mfu"] = round(per_s * self.flops_of_patch / PEAK_FLOPS, 4)
            tower.config._attn_implementation = usual
            found["loop / one_call"] = round(found["loop_ms"] / found["one_call_ms"], 2)
            apart = (features["loop"] - features["one_call"]).norm() / features["loop"].norm()
            found["relative_difference"] = float(f"{float(apart):.2g}")
            self.say(f"tower forward, {count} image{'s' * (count > 1)}", found)


def flops_of_patch(vision: Vision, size: Size, out: int) -> float:
    """Of one patch of a square image in the forward pass. With width D, gated MLPs of F, P numbers of a patch, B blocks, K
    patches that a patch sees in a block (a window's, in full blocks the image's), and ``out`` numbers O of a token:

        2 (B (4 D^2 + 3 D F) + P D + ((4 D)^2 + 4 D O) / 4)  +  4 D sum over blocks of K

    where 4 is the patches of a token; norms, rotation and softmax are left out."""
    width, merged = vision.hidden_size, vision.merged_size
    block = 4 * width**2 + 3 * width * vision.mlp_size
    projector = (merged**2 + merged * out) / vision.merge**2
    products = 2 * (vision.depth * block + vision.patch_size * width + projector)
    assert vision.window is not None
    window, image = (vision.window // vision.patch) ** 2, (size.side // vision.patch) ** 2
    full = len(vision.full_blocks)
    return products + 4 * width * (full * image + (vision.depth - full) * window)
