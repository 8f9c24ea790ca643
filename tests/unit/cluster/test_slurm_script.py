"""The rendered sbatch script: what it asks for, what it refuses, and that bash accepts it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlx.cli.main import main
from rlx.cluster.slurm import passed_names
from rlx.config.packaged import CHECKOUT
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


# Ends a child with 50 more than the first signal's number.
WATCHED = "for n in (10, 12, 15): signal.signal(n, lambda number, frame: sys.exit(50 + number))"
SIZE = ["--nodes", "3", "--gpus-per-node", "8", "--dry-run"]


def rendered(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    assert main(["launch", "slurm", str(config), *arguments, *SIZE]) == 0
    script = capsys.readouterr().out
    checkers = [["bash", "-n"], *([["shellcheck", "-"]] if shutil.which("shellcheck") else [])]
    for checker in checkers:
        done = subprocess.run(checker, input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return script


def test_splits_nodes_and_passes_nothing_by_accident(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name not in ("PATH", "HOME")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MINE", "1")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    script = rendered(capsys, config, "--rollout-nodes", "1", "--partition", "gpu", "--sbatch", "account=me", "--pass", "THEIRS")
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --account=me\n" in script
    assert "#SBATCH --export=PATH,HOME,LD_LIBRARY_PATH,NCCL_IB_HCA,THEIRS\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
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


def test_threads_are_the_ranks_to_share_out_unless_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "export OMP_NUM_THREADS" not in rendered(capsys, config, "--rollout-nodes", "1")
    assert "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-3}\n" in rendered(capsys, config, "--rollout-nodes", "1", "--threads", "3")


def test_what_a_job_gets_of_the_shell() -> None:
    given = [
        "HF_TOKEN",
        "NCCL_DEBUG",
        "RLX_ENGINE_API_KEY",
        "RLX_JOB_ID",
        "RLX_STOP_FILE",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    ]
    found = ("HF_TOKEN", "NCCL_DEBUG", "RLX_ENGINE_API_KEY")
    assert passed_names(given, in_container=False) == ("PATH", "HOME", "LD_LIBRARY_PATH", *found)
    assert passed_names(given, in_container=True) == ("PATH", "HOME", *found)


@pytest.mark.parametrize(
    ("options", "asked", "step"),
    [
        ([], [], "--open-mode=append)"),
        (["--mem", "0"], ["mem=0"], "--open-mode=append --mem=0)"),
        (["--cpus-per-task", "96"], ["cpus-per-task=96"], "--open-mode=append --cpus-per-task=96)"),
        (["--exclusive"], ["exclusive"], '--open-mode=append --exclusive --cpus-per-task="$SLURM_CPUS_ON_NODE")'),
        # Steps that share a node cannot have it for themselves; those on nodes of their own can.
        (
            ["--exclusive", "--flavour", "ray"],
            ["exclusive"],
            '--open-mode=append --overlap --cpus-per-task="$SLURM_CPUS_ON_NODE")',
        ),
        (["--rollout-nodes", "1"], [], "--open-mode=append --overlap)"),
        (
            ["--rollout-nodes", "1", "--exclusive", "--cpus-per-task", "8"],
            ["cpus-per-task=8", "exclusive"],
            "--open-mode=append --exclusive --cpus-per-task=8)",
        ),
    ],
)
def test_resources_of_the_job_are_those_of_its_steps(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], asked: list[str], step: str
) -> None:
    """srun takes none of them from the job, and --exclusive alone would give its task one CPU."""
    ranks = 16 if "--rollout-nodes" in options else 6
    script = rendered(capsys, config, f"cluster.num_trainer_ranks={ranks}", *options)
    assert [line for line in asked if f"#SBATCH --{line}\n" not in script] == []
    [found] = [line for line in script.splitlines() if line.startswith("step=(srun ")]
    assert found.endswith(step)


def test_sizes_come_from_the_configuration_and_gpus_have_a_type(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["cluster.nodes=2", "cluster.rollout_nodes=1", "cluster.gpus_per_node=4", "cluster.num_trainer_ranks=4"]
    assert main(["launch", "slurm", str(config), *sizes, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=4\n" in script and "export NNODES=1 " in script
    assert main(["launch", "slurm", str(config), *sizes, "--gpus-per-node", "h100:4", "--dry-run"]) == 0
    assert "#SBATCH --gpus-per-node=h100:4\n" in (script := capsys.readouterr().out) and "cluster.gpus_per_node=4" in script
    assert main(["launch", "slurm", str(config), "--dry-run"]) == 2
    assert "--nodes and --gpus-per-node: required where the configuration lacks cluster.nodes" in capsys.readouterr().err


def test_on_paper_the_login_node_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = CHECKOUT / "configs" / "recipes" / "gemma-2-9b-it-sft.yaml"
    assert main(["launch", "slurm", str(recipe), "--on-paper", "--flavour", "ray", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#   memory of the fullest trainer rank, GiB: about " in script and "-m rlx.cli.main sft " in script
    assert f"export RLX_NEEDED={tmp_path}/data/answers.jsonl\n" in script, "what the nodes must see; a hub id is no file"
    assert main(["launch", "slurm", str(recipe), "cluster.gpu_memory_gib=30", "--on-paper", "--dry-run"]) == 2
    assert "a trainer rank needs about 33 GiB of 30" in capsys.readouterr().err


@pytest.mark.parametrize("flavour", ["torchrun", "ray"])
@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_container(config: Path, capsys: pytest.CaptureFixture[str], runtime: str, flavour: str) -> None:
    (image := config.parent / "rlx.sif").touch()
    options = ["--container", str(image), "--container-runtime", runtime, "--mount", "/data", "--flavour", flavour]
    script = rendered(capsys, config, "cluster.num_trainer_ranks=6", *options)
    assert str(image) in script and ",/data\n" in script
    assert ("--container-image=" in script) == (runtime == "pyxis")
    assert ("apptainer exec --nv --cleanenv" in script) == (runtime == "apptainer")
    assert " PYTHON=python3 " in script and sys.executable not in script, "the container's own interpreter"
    assert "LD_LIBRARY_PATH" not in script


def test_models_data_and_what_their_links_lead_to_are_mounted(
    tmp_path_factory: pytest.TempPathFactory, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlx.cluster.slurm.SHARED", ())  # everything of a test lies below /tmp
    place = tmp_path_factory.mktemp("far")
    blobs, snapshot, data, other = (place / name for name in ("blobs", "snapshot", "data", "other"))
    for folder in (blobs, snapshot, data, other):
        folder.mkdir()
    (blobs / "1234").write_text(FACTS)
    (snapshot / "config.json").symlink_to(blobs / "1234")
    (other / "rewards.py").write_text("def mine(text): return 1.0")
    (data / "a.jsonl").write_text("")
    named = [
        f"model.path={snapshot}",
        f"data.train={data}/a.jsonl",
        f"reward.name={other}/rewards.py:mine",
        f"run.dir={place}/runs/1",
    ]
    options = ["--container", "nvcr.io#image", "--container-runtime", "pyxis", "--mount", "/local:/scratch"]
    script = rendered(capsys, config, "cluster.num_trainer_ranks=6", *named, *options)
    [mounts] = [line.removeprefix("mounts=").split(",") for line in script.splitlines() if line.startswith("mounts=")]
    assert {str(folder) for folder in (blobs, snapshot, data, other, place / "runs")} < set(mounts)
    assert str(CHECKOUT) in mounts and "/local:/scratch" in mounts
    for path in (snapshot, data / "a.jsonl", other / "rewards.py"):
        assert str(path) in script.partition("RLX_NEEDED=")[2].partition("echo")[0]


def test_a_task_passes_signals_on_by_its_role(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The shell in front of each task, without SLURM: those that serve outlive the signals that ask the others to save."""
    script = rendered(capsys, config, "cluster.num_trainer_ranks=6")
    wrapper = script.partition("task='")[2].partition("\nexit $status'")[0] + "\nexit $status"
    child = f"import signal, sys, time\n{WATCHED}\nopen(sys.argv[1], 'w').close()\nwhile True: time.sleep(0.05)"

    def ended_by(role: str, *numbers: int) -> int:
        started = tmp_path / f"{role}-{'-'.join(map(str, numbers))}"
        env = {
            "PATH": os.environ["PATH"],
            "TMPDIR": str(tmp_path / "scratch"),
            "SLURM_PROCID": "0",
            "RLX_NEEDED": f"{config}\n{tmp_path}",
        }
        command = ["bash", "-c", wrapper, "task", role, sys.executable, "-c", child, str(started)]
        process = subprocess.Popen(command, env=env)
        deadline = time.monotonic() + 20
        while not started.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        return process.wait(20)

    usr1, usr2, term = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM
    assert ended_by("trains", usr1) == usr1 + 50 and ended_by("trains", term) == usr1 + 50
    assert ended_by("serves", usr1, term, term, usr2) == term + 50
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rollout-nodes", "3"], "leaves none to train on"),
        (["cluster.num_trainer_ranks=8"], "cannot be split evenly over 3 trainer node"),
        (["cluster.num_trainer_ranks=30"], "has 8 GPUs"),
        (["--time", "soon"], "--time soon"),
        (["--time", "10", "--save-before", "600"], "not before the limit"),
        (["--container", "x"], "--container-runtime"),
        (["--container", "/no/image.sif", "--container-runtime", "pyxis"], "--container: no such image /no/image.sif"),
        (["--prologue", "/no/modules.sh"], "--prologue: no such file /no/modules.sh"),
        (
            ["cluster.num_trainer_ranks=6", "--container", "x", "--container-runtime", "pyxis", "--mount", "/a,/b"],
            "--mount: /a,/b cannot be mounted",
        ),
        (["--sbatch", "nodes=4"], "rlx sets nodes itself; use --nodes"),
        (["--sbatch", "signal=TERM"], "rlx sets signal itself; use --save-before"),
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
