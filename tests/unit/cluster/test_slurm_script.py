"""The rendered sbatch script: what it asks for, what it refuses, and that bash accepts it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rlx.cli.main import main
from tests.e2e.job import ROOT

CONFIG = """
model: {{path: {folder}}}
data: {{train: {folder}/train.jsonl}}
reward: {{name: numeric}}
parallel: {{tp: 2}}
rollout: {{num_engines: 2}}
"""
FACTS = '{"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 8, "vocab_size": 64}'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(FACTS)
    (tmp_path / "train.jsonl").write_text("")
    path = tmp_path / "run it.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


SIZE = ["--nodes", "3", "--gpus-per-node", "8", "--dry-run"]


def rendered(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    assert main(["launch", "slurm", str(config), *arguments, *SIZE]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return script


def test_splits_nodes_and_passes_nothing_by_accident(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = rendered(capsys, config, "--rollout-nodes", "1", "--partition", "gpu", "--sbatch", "account=me", "--pass", "HF_HOME")
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --account=me\n" in script
    assert "#SBATCH --export=PATH,HOME,HF_HOME\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert "export NNODES=2 NPROC_PER_NODE=8\n" in script
    assert "--nodes=1 --relative=2" in script and "rlx.cli.engines" in script
    assert "cluster.num_trainer_ranks=16" in script and "run.resume=auto" in script
    assert f"'{config}'" in script, "a path with a space is quoted"


def test_ray_flavour_starts_a_node_in_each_task_and_the_run_on_the_first(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = rendered(capsys, config, "--rollout-nodes", "1", "--flavour", "ray", "--partition", "gpu")
    assert "cluster.launcher=ray cluster.nodes=3 cluster.rollout_nodes=1 cluster.gpus_per_node=8" in script
    assert "cluster.num_trainer_ranks=16" in script and "run.resume=auto" in script
    assert "ray.scripts.scripts start" in script and "RAY_AUTH_MODE=token" in script and "--nodes=3 " in script
    assert '"cluster.ray_address=$MASTER_ADDR:$MASTER_PORT"' in script and "torchrun.sh" not in script


def test_ray_flavour_waits_for_its_nodes_unless_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = rendered(capsys, config, "cluster.ray_wait_s=5", "--rollout-nodes", "1", "--flavour", "ray")
    assert "cluster.ray_wait_s=600 cluster.ray_wait_s=5 " in script, "the last one wins"


@pytest.mark.parametrize("flavour", ["torchrun", "ray"])
@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_container(config: Path, capsys: pytest.CaptureFixture[str], runtime: str, flavour: str) -> None:
    options = ["--container", "/images/rlx", "--container-runtime", runtime, "--mount", "/data", "--flavour", flavour]
    script = rendered(capsys, config, "cluster.num_trainer_ranks=6", *options)
    assert "/images/rlx" in script and ",/data" in script
    assert ("--container-image=" in script) == (runtime == "pyxis")
    assert ("apptainer exec --nv --cleanenv" in script) == (runtime == "apptainer")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rollout-nodes", "3"], "leaves none to train on"),
        (["cluster.num_trainer_ranks=8"], "cannot be split evenly over 3 trainer node"),
        (["cluster.num_trainer_ranks=30"], "has 8 GPUs"),
        (["--time", "soon"], "--time soon"),
        (["--time", "10", "--save-before", "600"], "not before the limit"),
        (["--container", "x"], "--container-runtime"),
        (["--sbatch", "nodes=4"], "rlx sets nodes itself"),
    ],
)
def test_refusals(config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert main(["launch", "slurm", str(config), *arguments, *SIZE]) == 2
    assert told in capsys.readouterr().err


def test_without_sbatch_it_says_where_the_script_is(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    logs = config.parent / "logs"
    options = ["--nodes", "1", "--gpus-per-node", "0", "--log-dir", str(logs)]
    assert main(["launch", "slurm", str(config), *options]) == 1
    assert f"there is no sbatch here; the script is {logs / 'rlx.sbatch'}" in capsys.readouterr().err
    assert (ROOT / "launch" / "torchrun.sh").stat().st_mode & 0o111


def test_ray_flavour_runs_the_command_of_the_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = rendered(capsys, config, "finetune.objective=ipo", "cluster.num_trainer_ranks=6", "--flavour", "ray")
    assert '-m rlx.cli.main dpo "${config[@]}"' in script
