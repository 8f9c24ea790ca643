"""Co-located memory: each phase against a hand-worked sum, what is refused with which keys, and which transport goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import Sizes, sizes_of
from rlx.cli.check import plan
from rlx.cli.main import main
from rlx.config.load import ConfigError, load_config, on_paper
from rlx.config.memory import GIB, RESERVE_BYTES, Estimate, estimate
from rlx.config.parts import EngineSettings
from rlx.config.schema import Config
from rlx.config.sharing import (
    ENGINE_RESERVE_BYTES,
    HELD_SHARE,
    RESTING_BYTES,
    offload_level,
    release_level,
    shared_phases,
)
from rlx.placement.from_config import trainers_of_engines

Problems = Callable[..., tuple[str, ...]]
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
ARCHITECTURES = CONFIGS / "architectures"
SHARED = ("cluster.colocated=true", "rollout.engine=sglang", "cluster.device=cuda")
# The recipe is PPO's on two nodes.
GRPO = ("algorithm.name=grpo", "algorithm.kl_placement=loss", "rollout.samples_per_prompt=8")
ONE_NODE = ("cluster.nodes=1", "cluster.rollout_nodes=0", "cluster.num_trainer_ranks=4", "rollout.num_engines=4")


def recipe(*overrides: str, name: str = "llama-3.1-8b") -> Config:
    """Four trainer ranks (tp 4) and four engines of one GPU, on the same GPUs of 80 GiB; GRPO with a reference."""
    settings = [*SHARED, *GRPO, *ONE_NODE, *overrides]
    return on_paper(load_config(CONFIGS / "recipes" / f"{name}.yaml", settings, ARCHITECTURES), ARCHITECTURES)


def phases_of(config: Config) -> tuple[dict[str, tuple[int, int]], Estimate, Sizes]:
    sizes = sizes_of(read_architecture(config.model.path))
    found = estimate(config, sizes)
    return {phase.name: (phase.engine, phase.trainer) for phase in shared_phases(config, found, sizes)}, found, sizes


def test_phases_by_hand() -> None:
    """auto: optimizer and gradients away, the engines give back everything."""
    phases, found, sizes = phases_of(recipe())
    weights = 2 * found.weights  # the reference's too
    chunks = 2 * 2**29 + 2 * sizes.embedding  # the area, and the embedding as it comes
    assert list(phases) == ["rollout", "training", "publication"]
    assert phases["rollout"] == (ENGINE_RESERVE_BYTES + 48 * GIB, RESTING_BYTES + int(HELD_SHARE * weights))
    assert phases["training"] == (ENGINE_RESERVE_BYTES, found.trainer)
    assert phases["publication"] == (ENGINE_RESERVE_BYTES + found.engine_weights, RESERVE_BYTES + weights + chunks)


def test_what_each_setting_moves() -> None:
    base, found, _ = phases_of(recipe())
    everything, _, _ = phases_of(recipe("cluster.offload=all"))
    assert everything["rollout"] == (base["rollout"][0], RESTING_BYTES)
    assert everything["training"] == base["training"] and everything["publication"] == base["publication"]

    nothing, _, _ = phases_of(recipe("cluster.offload=none"))
    more = found.gradients + found.optimizer
    assert nothing["publication"][1] - base["publication"][1] == more
    assert nothing["rollout"][1] - base["rollout"][1] == pytest.approx(HELD_SHARE * more)

    loaded, _, _ = phases_of(recipe("rollout.release=kv_cache"))
    assert loaded["training"][0] == ENGINE_RESERVE_BYTES + found.engine_weights
    keeps, _, _ = phases_of(recipe("rollout.release=none"))
    assert keeps["training"][0] == keeps["publication"][0] == keeps["rollout"][0] == base["rollout"][0]

    less, _, _ = phases_of(recipe("rollout.server_args={mem-fraction-static: 0.4}", "sync.bucket_bytes=4294967296"))
    assert less["rollout"][0] == ENGINE_RESERVE_BYTES + 32 * GIB
    assert less["publication"][1] - base["publication"][1] == 8 * GIB - GIB

    critic, found, _ = phases_of(recipe("algorithm.name=ppo", "cluster.offload=none"))
    models = 2 + recipe("algorithm.name=ppo").has_reference
    kept = models * found.weights + 2 * (found.gradients + found.optimizer)
    assert critic["rollout"][1] == RESTING_BYTES + int(HELD_SHARE * kept)

    embedded, found, _ = phases_of(recipe("rollout.engine=embedded"))  # reserves nothing for keys and values
    assert embedded["rollout"][0] == ENGINE_RESERVE_BYTES + found.engine_weights

    wide, found, _ = phases_of(recipe("rollout.num_engines=1", "rollout.tp=4"))
    assert wide["training"] == (ENGINE_RESERVE_BYTES, found.trainer)


@pytest.mark.parametrize("overrides", [["cluster.device=cpu"], ["cluster.colocated=false"], ["finetune.objective=sft"]])
def test_nothing_is_said_where_no_gpu_is_shared(overrides: list[str]) -> None:
    assert phases_of(recipe(*overrides))[0] == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.gpu_memory_gib=160", "rollout.server_args={mem_fraction_static: 0.97}"],
         ["rollout takes about 168 GiB of 160", "cluster.offload=all", "server_args.mem_fraction_static"]),
        (["rollout.release=none"], ["training takes about 94", "rollout.release=all", "server_args.mem_fraction_static"]),
        (["rollout.release=kv_cache", "cluster.gpu_memory_gib=60"], ["training takes about 61", "rollout.release=all"]),
        (["cluster.offload=none", "cluster.gpu_memory_gib=58", "sync.bucket_bytes=12884901888"],
         ["publication takes about", "cluster.offload=optimizer", "sync.bucket_bytes"]),
        (["rollout.server_args={mem_fraction_static: 0.15}"], ["mem_fraction_static: 0.15 of 80 GiB", "15 GiB of weights"]),
    ],
)  # fmt: skip
def test_the_fullest_phase_is_refused_with_what_helps(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(recipe(*overrides))
    (problem,) = caught.value.problems
    assert all(word in problem for word in words), problem


def test_check_prints_the_phases_and_refuses_only_on_gpus_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", str(CONFIGS / "recipes" / "llama-3.1-8b.yaml"), *SHARED, *GRPO, *ONE_NODE, "rollout.release=none"]
    paper = ["--on-paper", str(ARCHITECTURES)]
    assert main([*arguments, *paper]) == 2
    assert main([*arguments, "cluster.gpus_per_node=null", *paper]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " = engine " in line]
    assert [line.split(":")[0] for line in lines] == ["#   rollout", "#   training", "#   publication"]
    assert lines[1].startswith("#   training: about 94.4 = engine 50.0 (weights and key-value cache) + trainer 44.4 (everything)")
    assert [line.endswith("; too much") for line in lines] == [False, True, False]


def test_levels_that_auto_stands_for() -> None:
    config = recipe()
    assert [offload_level(config, device) for device in ("cuda", "cpu")] == ["optimizer", "none"]
    assert [release_level(config.cluster, config.rollout, device) for device in ("cuda", "cpu")] == ["all", "none"]
    apart = recipe("cluster.colocated=false")
    assert offload_level(apart, "cuda") == release_level(apart.cluster, apart.rollout, "cuda") == "none"


@pytest.mark.parametrize(("ranks", "pp", "engines", "tp"), [(1, 1, 1, 1), (2, 1, 2, 1), (4, 1, 2, 2), (4, 2, 1, 3), (4, 4, 4, 1)])
def test_weights_go_by_ipc_wherever_engines_sit_on_the_trainers_gpus(
    problems: Problems, run_yaml: Path, ranks: int, pp: int, engines: int, tp: int
) -> None:
    overrides = [
        "cluster.colocated=true",
        "cluster.device=cuda",
        f"cluster.num_trainer_ranks={ranks}",
        f"parallel.pp={pp}",
        f"rollout.num_engines={engines}",
        f"rollout.tp={tp}",
    ]
    assert load_config(run_yaml, overrides).transport == "ipc"
    assert not any(problems(*overrides, f"sync.transport={transport}") for transport in ("ipc", "shm", "disk"))
    several = ["cluster.nodes=2", *overrides[:2], "cluster.num_trainer_ranks=8", "rollout.num_engines=8"]
    (problem,) = problems(*several)
    assert "sync.transport: ipc joins processes of one machine" in problem and "cluster.gpus_per_node" in problem
    assert not problems(*several, "cluster.gpus_per_node=4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.launcher=ray"], ["cluster.colocated", "ray", "cluster.launcher=local or torchrun"]),
        (["sync.transport=broadcast"], ["sync.transport", "ipc or disk"]),
        (["rollout.num_engines=2"], ["rollout.num_engines x rollout.tp", "2 x 1", "1 trainer rank"]),
        (["cluster.rollout_nodes=1", "sync.transport=disk"], ["cluster.rollout_nodes"]),
    ],
)
def test_what_cannot_be_co_located_is_refused(problems: Problems, overrides: list[str], words: list[str]) -> None:
    (problem,) = problems("cluster.colocated=true", "cluster.device=cuda", *overrides)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("overrides", "device", "nodes", "wanted"),
    [
        (["rollout.num_engines=4"], "cuda", 1, {0: [0], 1: [1], 2: [2], 3: [3]}),
        (["rollout.num_engines=2", "rollout.tp=2"], "cuda", 1, {0: [0, 1], 1: [2, 3]}),
        # One a node in turn, as they are seated.
        (["rollout.num_engines=2", "rollout.tp=2", "cluster.gpus_per_node=2"], "cuda", 2, {0: [0, 1], 1: [2, 3]}),
        (["rollout.num_engines=4", "cluster.gpus_per_node=2"], "cuda", 2, {0: [0], 1: [2], 2: [1], 3: [3]}),
        (["rollout.num_engines=3", "rollout.tp=3"], "cpu", 1, {0: [0, 1, 2], 1: [3, 0, 1], 2: [2, 3, 0]}),
    ],
)
def test_the_trainer_rank_on_the_gpu_of_each_engine_rank(
    run_yaml: Path, overrides: list[str], device: str, nodes: int, wanted: dict[int, list[int]]
) -> None:
    shared = [] if device == "cpu" else ["cluster.colocated=true", "cluster.device=cuda"]
    ranks = [f"cluster.nodes={nodes}", "cluster.num_trainer_ranks=4"]
    config = load_config(run_yaml, [*shared, *ranks, *overrides])
    assert trainers_of_engines(EngineSettings.of(config), config.parallel, device, nodes) == wanted
