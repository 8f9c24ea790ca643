"""The command line: exit status, what goes where, and that only the chosen command is imported."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rlx.cli.main import COMMANDS, Command, main
from rlx.config.convert import to_tree
from rlx.config.load import ConfigError, dump_config, load_config
from rlx.config.schema import Config, ModelConfig


def test_check_prints_a_configuration_that_loads_back(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.tp=2", "cluster.num_trainer_ranks=6", "rollout.samples_per_prompt=5"]
    assert main(["check", str(run_yaml), *overrides]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out) == to_tree(load_config(run_yaml, overrides))
    assert "6 trainer ranks" in out and "dp 3" in out and "40 samples" in out


@pytest.mark.parametrize(("objective", "command"), [("sft", "sft"), ("dpo", "dpo"), ("ipo", "dpo"), ("rm", "rm")])
def test_check_describes_fine_tuning(run_yaml: Path, capsys: pytest.CaptureFixture[str], objective: str, command: str) -> None:
    assert main(["check", str(run_yaml), f"finetune.objective={objective}", "finetune.epochs=2.5"]) == 0
    out = capsys.readouterr().out
    assert "no engines" in out and "answers" not in out and "engine GPU" not in out
    assert f"# update: {objective} (rlx {command}), 2.5 epochs of " in out
    assert ("32 examples a step" in out) == (objective == "sft") and ("32 pairs a step" in out) == (objective != "sft")
    assert (", reference " in out) == (command == "dpo")


def test_wrong_configuration_is_status_2_without_traceback(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run_yaml), "run.stepz=1", "rollout.top_p=0.5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert "run.steps" in captured.err and "rollout.top_p" in captured.err


@pytest.mark.parametrize("argv", [[], ["nope"], ["check"], ["check", "x.yaml", "--nope"]])
def test_bad_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_options_may_stand_between_overrides(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run_yaml), "run.steps=7", "--all-rows", "run.seed=8", "run.steps=9"]) == 0
    printed, _ = capsys.readouterr()
    assert "steps: 9" in printed and "seed: 8" in printed
    with pytest.raises(SystemExit):
        main(["reward", "try", str(run_yaml), "--rows", "2", "run.steps=7", "--nope"])
    assert "unrecognized arguments: run.steps=7 --nope" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(run_yaml), "--out", "x", "y"])


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"\n    {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError(["a: wrong", "b: wrong"]), 2, "a: wrong\nb: wrong\n"),
        (RuntimeError("engine-1 died"), 1, "rlx probe: failed: RuntimeError: engine-1 died\n"),
        (KeyboardInterrupt(), 130, "rlx probe: interrupted\n"),
        (None, 0, ""),
    ],
)
def test_outcome_becomes_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException | None, status: int, words: str
) -> None:
    def run(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        return int(args.number)

    module = ModuleType("probe_command")
    module.add_arguments = lambda parser: parser.add_argument("number", type=int)  # type: ignore[attr-defined]
    module.main = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(COMMANDS, "probe", Command("probe_command", "a probe"))
    assert main(["probe", "0"]) == status
    assert capsys.readouterr().err.endswith(words)


def test_eval_is_a_job_of_its_own(run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs evaluation sets and nothing to train on; other commands refuse such a configuration."""
    started: list[Config] = []
    monkeypatch.setattr("rlx.cli.train.preflight", lambda config: config)
    monkeypatch.setattr("rlx.cli.train.run_job", lambda config, make: started.append(config) or 0)
    held_out = f"evaluation.data={run_yaml.parent / 'train.jsonl'}"
    assert main(["eval", str(run_yaml), held_out, "data.train=null", "rollout.top_p=0.9"]) == 0
    assert main(["eval", str(run_yaml), held_out, "data.train=null", "finetune.objective=dpo"]) == 0
    assert [(config.command, config.evaluation.only) for config in started] == [("eval", True)] * 2
    assert not started[0].trains_critic and not started[0].has_reference and started[1].has_reference
    assert main(["eval", str(run_yaml)]) == 2 and "evaluation.data" in capsys.readouterr().err
    assert main(["train", str(run_yaml), held_out, "evaluation.only=true"]) == 2
    assert "evaluation.only is not for rlx train; use rlx eval" in capsys.readouterr().err
    assert len(started) == 2


def test_export_says_what_is_missing_before_it_starts(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        assert main(["export", *arguments]) == 2
        return capsys.readouterr().err

    run_dir = run_yaml.parent / "run"
    assert "not a run folder" in told(str(run_dir))
    run_dir.mkdir()
    # Data that is gone is no reason.
    config = load_config(run_yaml)
    (run_yaml.parent / "train.jsonl").unlink()
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    assert "no whole checkpoint yet" in told(str(run_dir))
    for step in (2, 12):
        (run_dir / "checkpoints" / f"step-{step:08d}").mkdir()
    assert "--step 4: " in (error := told(str(run_dir), "--step", "4")) and "steps 2, 12" in error
    (run_dir / "hf-step-12").mkdir()
    assert "hf-step-12 is there already" in told(str(run_dir))
    (run_dir / "config.yaml").write_text(dump_config(replace(config, model=ModelConfig(path="models/gone"))))
    assert "model.path: no such folder models/gone" in told(str(run_dir), "--step", "2")


def test_every_command_has_its_module() -> None:
    assert [name for name, command in COMMANDS.items() if find_spec(command.module) is None] == []


def test_a_reader_that_has_seen_enough_is_no_failure(run_yaml: Path) -> None:
    """``rlx check ... | head -1``: the pipe is closed while there is more to print."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rlx.cli.main", "check", str(run_yaml)]
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Broken pipe" not in done.stderr and "Traceback" not in done.stderr
