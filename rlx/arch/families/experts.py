"""What mixture-of-experts families share: the rows of routers, experts and shared experts, and how layers are counted.

Experts are rows with ``{expert}`` in their names, one Hugging Face tensor a projection and expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlx.arch.architecture import Architecture, Experts
from rlx.arch.fields import ConfigJson, Fields, flag, listed, whole, words
from rlx.arch.weights import Copy, Gated, Row

_MLP = "decoder.layers.{layer}.mlp."
# How pretraining balanced the experts, which says nothing about log-probs.
ROUTING_NAMES = words("router_aux_loss_coef output_router_logits aux_loss_alpha seq_aux router_z_loss_coef")
# How the Qwen families say which layers have experts.
SPARSE_STEPS: Fields = {"decoder_sparse_step": whole(1), "mlp_only_layers": listed(int), "norm_topk_prob": flag(False)}
TOWER_ROWS, PROJECTOR_ROWS = "vision.", "vision.merger."
DENSE_ROWS = (_MLP + "linear_fc1.", _MLP + "linear_fc2.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Hugging Face names below a layer: of the block, the projections of an expert, and the shared expert."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


def layers_of(row: str, arch: Architecture) -> list[int]:
    """The numbers of the layers (of a tower: its blocks) that have the row of this Megatron name; a row outside the layers counts
    as layer 0."""
    if "{layer}" not in row:
        return [0]
    if row.startswith(TOWER_ROWS):
        assert arch.vision is not None
        return list(range(arch.vision.depth))
    layers = range(arch.num_layers)
    if row.startswith(DENSE_ROWS):
        return [layer for layer in layers if not arch.has_experts(layer)]
    if row.startswith(_MLP):
        return [layer for layer in layers if arch.has_experts(layer)]
    return list(layers)


def expert_rows(experts: Experts, names: ExpertNames) -> Mapping[str, Row]:
    """The rows of one mixture-of-experts block, by Megatron name."""
    block = "model.layers.{layer}." + names.block + "."
    one = block + "experts.{expert}."
    rows: dict[str, Row] = {
        _MLP + "router.weight": Copy(block + "gate.weight", _router),
        _MLP + "experts.{expert}.linear_fc1.weight": Gated(
            f"{one}{names.gate}.weight", f"{one}{names.up}.weight", size=_expert_size
        ),
        _MLP + "experts.{expert}.linear_fc2.weight": Copy(f"{one}{names.down}.weight", _expert_down, dim=1),
    }
    if experts.score_bias:
        rows[_MLP + "router.expert_bias"] = Copy(block + "gate.e_score_correction_bias", _bias)
    if experts.shared_hidden_size:
        shared = f"{block}{names.shared}."
        rows[_MLP + "shared_experts.linear_fc1.weight"] = Gated(
            shared + "gate_proj.weight", shared + "up_proj.weight", size=_shared_size
        )
        rows[_MLP + "shared_experts.linear_fc2.weight"] = Copy(shared + "down_proj.weight", _shared_down, dim=1)
    if experts.shared_gate:
        rows[_MLP + "shared_experts.gate_weight"] = Copy(f"{block}{names.shared}_gate.weight", _gate)
    return rows


def sparse_step_layers(config: ConfigJson) -> tuple[bool, ...]:
    """Layers with experts: every ``decoder_sparse_step``-th, but for ``mlp_only_layers``."""
    step, dense = config["decoder_sparse_step"], set(config["mlp_only_layers"] or ())
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(config["num_hidden_layers"]))


def _experts(arch: Architecture) -> Experts:
    assert arch.experts is not None
    return arch.experts


def _router(arch: Architecture) -> tuple[int, ...]:
    return _experts(arch).num_experts, arch.hidden_size


def _bias(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).num_experts,)


def _expert_size(arch: Architecture) -> int:
    return _experts(arch).hidden_size


def _expert_down(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, _experts(arch).hidden_size


def _shared_size(arch: Architecture) -> int:
    return _experts(arch).shared_hidden_size


def _shared_down(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, _experts(arch).shared_hidden_size


def _gate(arch: Architecture) -> tuple[int, ...]:
    return 1, arch.hidden_size
