"""Logits of bf16 models in fp32: tied and untied output layers, soft caps, on one rank and split over two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.launch import ROOT, run_ranks

# Its own process, as the ranks' CPU backend replaces factories that transformers needs. Output weights large enough for
# logits whose bf16 steps matter.
MAKE = """
import sys, torch
from tests.dist.family_cases import gemma2, qwen2
for seed, (name, model) in enumerate({"gemma2": gemma2(final_logit_softcapping=30.0), "qwen2": qwen2()}.items()):
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_output_embeddings().weight
    weight.data = torch.randn(weight.shape, generator=generator)
    model.to(torch.bfloat16).save_pretrained(f"{sys.argv[1]}/{name}")
"""
OUTPUT_WEIGHTS = {"gemma2": "model.embed_tokens.weight", "qwen2": "lm_head.weight"}
SOFTCAPS = {"gemma2": 30.0, "qwen2": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp32-head")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", MAKE, str(root)], env=env, cwd=ROOT, check=True, timeout=240)
    return root


@pytest.mark.parametrize("world_size", [1, 2])
def test_logprobs_of_a_bf16_model_equal_float64_of_its_hidden_states(world_size: int, root: Path, tmp_path: Path) -> None:
    folders = [str(root / name) for name in OUTPUT_WEIGHTS]
    run_ranks("tests.dist.programs.fp32_head", world_size, {"folders": folders}, tmp_path / "out.pt")
    for name, packs in zip(OUTPUT_WEIGHTS, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
        weight = load_file(root / name / "model.safetensors")[OUTPUT_WEIGHTS[name]]
        worst = {"fp32": 0.0, "bf16": 0.0}
        for pack in packs:
            assert pack["hidden"].dtype == weight.dtype == torch.bfloat16
            logits = pack["hidden"].double() @ weight.double().t()
            cap = SOFTCAPS[name]
            logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / 0.7
            every = logits.log_softmax(-1)
            wanted = torch.stack([every.gather(1, pack["labels"][:, None])[:, 0], -(every.exp() * every).sum(-1)])
            for head in worst:
                worst[head] = max(worst[head], float((pack[head].double() - wanted).abs().max()))
        assert worst["fp32"] < 3e-5 and worst["bf16"] > 0.02, (name, worst)
