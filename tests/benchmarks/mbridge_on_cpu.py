"""Hugging Face folder to torch_dist by mbridge, for the converter's benchmark: ``mbridge_on_cpu.py HF_DIR OUT_DIR``.

mbridge 0.15.1 is written for GPUs, Transformer Engine and an earlier megatron-core. What it lacks here is put in its place:
rlx's answers to Megatron's CUDA calls, Megatron's layers without Transformer Engine, their names of two norms, and a member of an
enumeration that megatron-core 0.19 no longer has. Reading, merging and filling the model are mbridge's own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import tests.dist.on_cpu  # noqa: F401  (answers Megatron's CUDA calls, before Megatron is imported)

# isort: split
from mbridge import AutoBridge  # type: ignore[import-not-found]
from mbridge.core.llm_bridge import LLMBridge  # type: ignore[import-not-found]
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import ModelType
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def adapt() -> None:
    """Put in place what mbridge lacks here."""
    ModelType.encoder_and_decoder = None
    hf_names = LLMBridge._weight_name_mapping_mcore_to_hf

    def hf_names_of(self: Any, name: str) -> Any:
        for plain, fused in _FUSED_NORMS.items():
            name = name.replace(plain, fused)
        return hf_names(self, name)

    def layers(self: Any, vp_stage: int | None = None) -> Any:
        return get_gpt_decoder_block_spec(self.config, use_transformer_engine=False)

    LLMBridge._weight_name_mapping_mcore_to_hf = hf_names_of
    LLMBridge._get_transformer_layer_spec = layers


def main(source: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        adapt()
        bridge = AutoBridge.from_pretrained(source)
        bridge.hf_config.rope_theta = 1e6  # transformers 5 has it elsewhere; no weight depends on it
        # The weights come from the files: no time for random ones.
        bridge.config.use_cpu_initialization, bridge.config.perform_initialization = True, False
        (model,) = bridge.get_model()
        bridge.load_weights([model], source)
        target.mkdir()
        dist_checkpointing.save(getattr(model, "module", model).sharded_state_dict(), str(target))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
