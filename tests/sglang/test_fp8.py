"""SGLang's own models take what engines of FP8 weights start from and are sent. On CPUs without AMX it cannot compute with it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlx.arch.engine_format import QUANTIZATION, engine_format
from rlx.arch.families.registry import architecture_of
from rlx.models.hf.blank import write_blank
from rlx.rollout.sglang.server import write_modules
from rlx.sync.engine_tensors import EngineTensors
from rlx.sync.proof.checksums import Checksums, watched
from tests.ports import free_port
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import sglang_python
from tests.unit.sync.test_engine_format import MOE, QWEN

LIMIT_S = 400
_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
FAMILIES = {
    "Qwen2ForCausalLM": QWEN,
    "Qwen3ForCausalLM": QWEN | {"model_type": "qwen3", "head_dim": 64},
    "Qwen3MoeForCausalLM": MOE | _EXPERTS,
    "Qwen2MoeForCausalLM": QWEN
    | _EXPERTS
    | {"model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    | {"shared_expert_intermediate_size": 256},
    "MixtralForCausalLM": QWEN
    | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
}
# Builds each model as a server does, short of what it does to weights for CPU kernels; loads, and sums up as /weights_checker.
PROGRAM = """
import hashlib, json, sys, torch
from importlib.metadata import version
if not version("sglang").startswith("0.5.15"):
    sys.exit(77)
from safetensors.torch import load_file
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model, set_default_torch_dtype
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.utils.weight_checker import _build_check_entries, _build_quantized_set

for number, folder in enumerate(sys.argv[2:]):
    args = ServerArgs(model_path=folder, device="cpu", dtype="bfloat16", attention_backend="torch_native",
                      disable_cuda_graph=True, skip_tokenizer_init=True, mem_fraction_static=0.1)
    set_global_server_args_for_scheduler(args)
    model_config, load_config = ModelConfig.from_server_args(args), LoadConfig(load_format="auto")
    if not number:
        where = f"tcp://127.0.0.1:{sys.argv[1]}"
        init_distributed_environment(world_size=1, rank=0, distributed_init_method=where, local_rank=0, backend="gloo")
        initialize_model_parallel()
        initialize_dp_attention(args, model_config)
        initialize_moe_config(args)
    with set_default_torch_dtype(torch.bfloat16):
        model = _initialize_model(model_config, load_config, _get_quantization_config(model_config, load_config))
    sums = []
    for file in ("model-00000.safetensors", "sent"):
        model.load_weights(iter(load_file(f"{folder}/{file}").items()))
        held = {name: parameter.data for name, parameter in model.named_parameters() if name[-7:] not in ("k_scale", "v_scale")}
        entries = _build_check_entries(held, set(), _build_quantized_set(model))
        whole = {name: weight.dequantize().data.contiguous().flatten().view(torch.uint8) for name, _, weight in entries}
        sums.append([name for name, raw in whole.items() if not raw.any()])
        sums.append({name: hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16] for name, raw in whole.items()})
    with open(folder + "/found.json", "w") as file:
        json.dump({"zeros": sums[0], "sums": sums[3]}, file)
"""


@pytest.mark.sglang
@needs_sglang
def test_every_parameter_is_filled_by_what_is_sent(tmp_path: Path) -> None:
    wanted, sent = {}, {}
    for name, config in FAMILIES.items():
        folder = tmp_path / name
        folder.mkdir()
        shared = {"architectures": [name], "torch_dtype": "bfloat16", "max_position_embeddings": 512, "rope_theta": 10000.0}
        described = config | shared | {"hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1}
        wanted[name] = engine_format(architecture_of(described), fp8=True)
        (folder / "config.json").write_text(json.dumps(described | {"quantization_config": dict(QUANTIZATION)}))
        write_blank(folder, wanted[name].expected, wanted[name].dtypes, "bfloat16")
        weights = {each: torch.randn(shape).bfloat16() for each, shape in wanted[name].shapes.items()}
        sent[name] = dict(EngineTensors(iter(weights.items()), wanted[name]))
        save_file(sent[name], folder / "sent")
    write_modules(tmp_path / "modules", "cpu")
    env = os.environ | {
        "PYTHONPATH": str(tmp_path / "modules"),
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_NCCL_SO_PATH": "/nonexistent",
    }
    python = sglang_python()
    assert python is not None
    argv = [python, "-c", PROGRAM, str(free_port()), *(str(tmp_path / name) for name in FAMILIES)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == 77:
        pytest.skip("what is called inside SGLang is as 0.5.15 has it")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in FAMILIES:
        found = json.loads((tmp_path / name / "found.json").read_text())
        assert set(found["zeros"]) == set(found["sums"]), name
        book = Checksums(found["sums"], 1, torch.bfloat16)
        list(watched(((each, sent[name][each]) for each in wanted[name].expected), [book]))
        assert book.found() == {each: [value] for each, value in found["sums"].items()}, name
