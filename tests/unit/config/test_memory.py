"""Parameter counts against published ones, and the estimate against hand-worked sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlx.arch.families.registry import architecture_of, read_architecture
from rlx.arch.sizes import sizes_of
from rlx.cli.check import plan, summary
from rlx.cli.main import main
from rlx.config.load import ConfigError, load_config, on_paper
from rlx.config.memory import GIB, RESERVE_BYTES, describe, estimate
from rlx.config.schema import Config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
ARCHITECTURES = CONFIGS / "architectures"

# Eight ranks in two tensor-parallel groups of four; the recipe is PPO's.
GRPO = ["algorithm.name=grpo", "algorithm.kl_placement=loss", "rollout.samples_per_prompt=8"]

# As the models' own pages count them.
PUBLISHED = {
    "Qwen2-7B": 7_615_616_512,
    "Qwen2-7B-Instruct": 7_615_616_512,
    "Qwen2-57B-A14B": 57.41e9,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "gemma-2-9b-it": 9_241_705_984,
    "gemma-2-27b-it": 27_227_128_320,
    "deepseek-llm-7b-base": 6_910_365_696,
    "deepseek-llm-67b-base": 67.4e9,
    "deepseek-moe-16b-base": 16_375_728_128,
    "DeepSeek-V3": 671_026_419_200,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-3-medium-4k-instruct": 13_960_238_080,
    "Yi-1.5-34B-200K": 34_388_917_248,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
}

QWEN_1_5B: dict[str, object] = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def paper(recipe: str, *overrides: str) -> Config:
    """A recipe with its model's shape."""
    return on_paper(load_config(CONFIGS / "recipes" / f"{recipe}.yaml", overrides, ARCHITECTURES), ARCHITECTURES)


def test_every_shape_is_read_in_full_and_counted() -> None:
    """The models of the recipes; whatever else lies beside them is nobody's."""
    recipes = [path for path in (CONFIGS / "recipes").glob("*.yaml") if not path.name.startswith("base")]
    named = {Path(load_config(path, [], ARCHITECTURES).model.path).name for path in recipes}
    assert named == set(PUBLISHED)
    assert all(read_architecture(ARCHITECTURES / name).num_layers for name in named)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    assert sizes_of(read_architecture(ARCHITECTURES / name)).total == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_estimate_by_hand() -> None:
    """Two layers of 8 hidden, 4 heads of 2, 16 inner, 10 words; bf16, tp 2, dp 3, GRPO with a reference."""
    tree = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    sizes = sizes_of(architecture_of(tree | {"vocab_size": 10}))
    assert sizes.total == 2 * (4 * 64 + 3 * 128 + 2 * 8) + 2 * 80 + 8
    config = paper("llama-3.1-8b", *GRPO, "parallel.tp=2", "cluster.num_trainer_ranks=6")
    config = replace(config, batching=replace(config.batching, max_tokens_per_micro_batch=100))
    found = estimate(config, sizes)
    local = (sizes.total - 8) // 2  # but for the last norm
    assert (found.weights, found.gradients, found.other_models) == (2 * local, 4 * local, 2 * local)
    assert found.optimizer == 12 * local // 3
    gathered = 2 * 2 * 100 * 8  # hidden states of all tokens and their gradient
    assert found.logits == 100 * 10 // 2 * (2 + 2) + (4 + 2) * 10 // 2 * 8 + gathered
    kept = 2 * 100 * 8 // 2 * 2  # full recomputation with sequence parallelism: the inputs of two layers, halved
    at_work = 2 * 100 * (4 * 8 // 2 + (2 * 2 * 8 + 3 * 16) // 2)
    assert found.activations == kept + at_work - found.logits
    part = replace(config, model=replace(config.model, recompute_layers=1))
    assert estimate(part, sizes).activations == (kept + at_work * 2) // 2 + at_work - found.logits, "one layer of two keeps all"
    none = replace(config, model=replace(config.model, recompute="none"))
    assert estimate(none, sizes).activations == 2 * at_work
    without_mlp = replace(config, model=replace(config.model, recompute="selective"))
    mlp = 2 * 100 * 3 * 16 // 2
    assert estimate(without_mlp, sizes).activations == 2 * (at_work - mlp) + max(0, mlp - found.logits)
    of_torch = replace(none, model=replace(none.model, layer_spec="torch"))
    assert estimate(of_torch, sizes).activations == 2 * (at_work + 2 * 100 * (5 * 8 + 2 * 16) // 2), (
        "norms in fp32, both kernels of the gate; no heads share keys"
    )
    assert found.trainer == 8 * local + found.optimizer + found.logits + found.activations + RESERVE_BYTES


def test_an_optimizer_on_the_host_takes_memory_there() -> None:
    base = paper("qwen2.5-7b")
    sizes = sizes_of(read_architecture(base.model.path))
    moved = [
        estimate(paper("qwen2.5-7b", *keys), sizes)
        for keys in ((), ("optimizer.offload=true",), ("optimizer.offload=true", "critic_optimizer.offload=true"))
    ]
    state = moved[0].optimizer
    assert [found.optimizer for found in moved] == [state, 0, 0]
    assert [moved[0].other_models - found.other_models for found in moved] == [0, 0, state]
    assert [found.host for found in moved] == [pytest.approx(times * state / 12 * 16, abs=2) for times in (0, 1, 2)]
    assert any("host memory of that rank" in line for line in describe(moved[1], sizes))


def test_fine_tuning_holds_what_it_trains() -> None:
    """No engines and no critic; a reference for preferences alone, and no logits of a reward model."""
    found = {}
    for objective in ("sft", "dpo", "rm"):
        config = paper("llama-3.1-8b", f"finetune.objective={objective}", "cluster.rollout_nodes=0", "finetune.max_tokens=1024")
        found[objective] = estimate(config, sizes_of(read_architecture(config.model.path)))
    assert found["sft"].other_models == found["rm"].other_models == 0
    assert found["dpo"].other_models == found["dpo"].weights
    assert found["rm"].logits == 0 < found["dpo"].logits
    assert all(one.engine_weights == 0 for one in found.values())


def test_an_evaluation_alone_holds_weights() -> None:
    config = paper("qwen2.5-7b")
    only = replace(config, evaluation=replace(config.evaluation, only=True))
    trains, reads = (estimate(one, sizes_of(read_architecture(one.model.path))) for one in (config, only))
    assert trains.other_models > reads.other_models == reads.gradients == reads.optimizer == 0
    assert reads.weights == trains.weights and reads.engine_weights == trains.engine_weights


def test_fp8_engines_hold_half_of_what_is_converted() -> None:
    """Of the 7B all but embedding, output layer, norms and biases; four bytes of scale for each 16,384 numbers."""
    config = paper("qwen2.5-7b", "rollout.engine=sglang", "rollout.fp8=true", "model.dtype=bf16", "rollout.tp=2")
    sizes = sizes_of(read_architecture(config.model.path))
    kept = sizes.embedding + sizes.output + (2 * 28 + 1) * 3584 + 28 * (3584 + 2 * 512)
    converted = sizes.total - kept
    assert estimate(config, sizes).engine_weights == (converted + 4 * converted // 128**2 + 2 * kept) // 2
    assert "engines of FP8 weights" in summary(config)[0]


def test_experts_are_split_over_ep_and_pipelines_take_the_fullest_stage() -> None:
    sizes = sizes_of(read_architecture(ARCHITECTURES / "DeepSeek-V3"))
    config = paper("deepseek-v3")
    found = estimate(config, sizes)
    layers = 8  # of 61 over 8 stages: the second one, the first has 7, three of them dense
    dense = layers * (sizes.attention + sizes.moe_mlp)
    expected = 2 * (dense / 8 + layers * sizes.experts / 32)
    assert found.weights == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("recipe", "architecture", "tp", "tokens", "spec", "measured"),
    [
        ("qwen2.5-7b", QWEN_1_5B, 1, 16_384, "torch", 83.0),
        ("llama-3.1-8b", None, 2, 16_384, "auto", 103.8),
        ("qwen2.5-vl-3b", None, 2, 8_192, "auto", 42.3),  # on text alone
    ],
)
def test_peaks_as_measured(
    recipe: str, architecture: dict[str, object] | None, tp: int, tokens: int, spec: str, measured: float
) -> None:
    """``torch.cuda.max_memory_allocated`` over two updates on H200s (docs/gpu.md), GiB."""
    base = paper(recipe, *GRPO, "algorithm.kl_placement=none", f"parallel.tp={tp}", f"parallel.sequence_parallel={tp > 1}")
    sizes = sizes_of(read_architecture(base.model.path) if architecture is None else architecture_of(architecture))
    batching = replace(base.batching, max_tokens_per_micro_batch=tokens, max_patches_per_micro_batch=1)
    model = replace(base.model, recompute="none", layer_spec=spec, vision="frozen")
    config = replace(base, batching=batching, model=model, cluster=replace(base.cluster, num_trainer_ranks=tp))
    found = estimate(config, sizes)
    assert found.allocated / GIB == pytest.approx(measured, rel=0.05), found


def test_pipelines_hold_most_at_their_first_stage() -> None:
    config = paper(
        "qwen2.5-7b", *GRPO, "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=4", "model.recompute=none"
    )
    sizes = sizes_of(read_architecture(config.model.path))
    chunked = replace(config, parallel=replace(config.parallel, vpp=7))
    whole, single = (
        estimate(one, sizes).activations for one in (config, replace(config, parallel=replace(config.parallel, pp=1)))
    )
    assert whole == single, "as many micro-batches as stages, of a part of the layers each"
    assert estimate(chunked, sizes).activations == pytest.approx(whole * (1 + 3 / 28), rel=0.01)
    assert estimate(config, sizes).logits == 0, "the last stage is not the fullest"


def test_what_does_not_fit_is_refused_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(CONFIGS / "recipes" / "llama-3.1-70b.yaml"), "--on-paper", str(ARCHITECTURES)]) == 0
    assert "# node 0-7: [T T T T T T T T]" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"gpu_memory_gib: a trainer rank needs about \d+ GiB of 40"):
        plan(paper("llama-3.1-70b", "cluster.gpu_memory_gib=40"))
    with pytest.raises(ConfigError, match=r"rollout\.tp: 131 GiB of weights .* use at least 3"):
        plan(paper("llama-3.1-70b", "rollout.tp=1"))
    with pytest.raises(ConfigError, match=r"12 trainer nodes or 64 ranks"):
        plan(paper("llama-3.1-70b", "cluster.num_trainer_ranks=96"))


def test_a_tower_is_whole_on_the_fullest_stage_and_costs_gradients_where_it_learns() -> None:
    """Two blocks of 8 with a gated MLP of 20 beside the text model; 100 patches at most."""
    text = {"model_type": "qwen2_5_vl", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    tower = {"depth": 2, "hidden_size": 8, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 16}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    more = {"num_key_value_heads": 1, "intermediate_size": 24, "image_token_id": 7, "bos_token_id": 1, "eos_token_id": 2}
    sizes = sizes_of(architecture_of({**text, **more, **rope, "vision_config": tower}))
    block = 4 * 64 + 4 * 8 + 3 * 160 + 2 * 20 + 8 + 2 * 8
    assert sizes.projector == 8 + 32 * 33 + 16 * 33 and sizes.tower == 1176 * 8 + 2 * block + sizes.projector
    found = {}
    for learns in ("frozen", "projector", "train"):
        changes = [*GRPO, "parallel.tp=2", "cluster.num_trainer_ranks=6", f"model.vision={learns}"]
        config = paper("llama-3.1-8b", *changes, "batching.max_patches_per_micro_batch=100")
        found[learns] = estimate(config, sizes)
    plain = estimate(config, replace(sizes, tower=0, projector=0, arch=replace(sizes.arch, vision=None)))
    learnt = {"frozen": 0, "projector": sizes.projector, "train": sizes.tower}
    for learns, one in found.items():
        assert one.weights == plain.weights + 2 * sizes.tower and one.other_models == one.weights
        assert one.gradients == plain.gradients + 4 * learnt[learns]
        assert one.optimizer == pytest.approx(plain.optimizer + 12 * learnt[learns] / 3, abs=1)
        assert one.patches == 2 * 100 * (12 * 8 + 3 * 20 + (16 if learns == "train" else 0))
    assert plain.patches == 0 and (found["frozen"].activations, found["frozen"].logits) == (plain.activations, plain.logits)
