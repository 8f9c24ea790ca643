"""Which run folders a launch accepts, and what it leaves of an old run."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.config.checks.contradictions import check
from rlx.config.load import ConfigError
from rlx.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig, RewardConfig, RunConfig
from rlx.processes.rundir import check_place, open_run_dir
from tests.tiny import write_model


def config_for(run_dir: Path, **run: object) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t.jsonl"),
        reward=RewardConfig(name="exact"),
        run=RunConfig(dir=str(run_dir), **run),  # type: ignore[arg-type]
    )


def opened_dir(config: Config) -> AbstractContextManager[Path]:
    return open_run_dir(config.run, evaluates=config.evaluation.only)


def old_run(run_dir: Path) -> Path:
    for name in ("checkpoints/step-000003/model.bin", "hf/config.json", "logs/trainer-0.log", "metrics.jsonl", "notes.txt"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("old")
    return run_dir


def test_old_run_is_refused_untouched(tmp_path: Path) -> None:
    run_dir = old_run(tmp_path / "run")
    before = sorted(run_dir.rglob("*"))
    with (
        pytest.raises(ConfigError, match=r"run\.dir: .*run\.resume=auto.*run\.overwrite=true"),
        opened_dir(config_for(run_dir)),
    ):
        pass
    assert sorted(run_dir.rglob("*")) == before


def test_resume_keeps_everything_but_stale_endpoints(tmp_path: Path) -> None:
    run_dir = old_run(tmp_path / "run")
    (run_dir / "engines.json").write_text('["http://127.0.0.1:1"]')
    with opened_dir(config_for(run_dir, resume="auto")) as opened:
        assert opened == run_dir
    assert (run_dir / "checkpoints/step-000003/model.bin").read_text() == "old" and (run_dir / "hf").is_dir()
    assert not (run_dir / "engines.json").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/proc/x", "cannot write to /proc/x"),
        ("/proc/x/y/z", "cannot write to /proc/x/y/z"),
        ("HERE/file/run", "Not a directory"),
        ("HERE/file", "Not a directory"),
        ("HERE/nowhere", "No such file"),
        ("HERE/" + "n" * 300, "name too long"),
    ],
)
def test_places_that_cannot_be_written_to_are_named(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "more")
    with pytest.raises(ConfigError, match=r"^run\.dir: cannot write to .*" + words.rpartition("cannot write to ")[2]):
        check_place("run.dir", place.replace("HERE", str(tmp_path)))


def test_looking_at_a_place_leaves_nothing_behind(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a/b/c"):
        check_place("run.dir", folder)
    assert not list(tmp_path.iterdir())


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run_dir = old_run(tmp_path / "run")
    with opened_dir(config_for(run_dir, overwrite=True)):
        left = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*"))
    assert left == [".lock", "logs", "notes.txt"]


def test_contradiction_and_file_in_the_way(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1"}')
    run = replace(config_for(rows), model=ModelConfig(path=str(model)), data=DataConfig(train=str(rows)))
    assert [line.partition(":")[0] for line in check(run)] == ["run.dir"]
    both = replace(run, run=RunConfig(dir=str(tmp_path / "run"), overwrite=True, resume="auto"))
    assert [line.partition(":")[0] for line in check(both)] == ["run.overwrite"]
    with pytest.raises(ConfigError, match="cannot write"), opened_dir(config_for(Path("/proc/nowhere/run"))):
        pass


def test_two_launchers_do_not_share_a_folder(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    with opened_dir(config), pytest.raises(ConfigError, match="another launcher is at work"), opened_dir(config):
        pass
    with opened_dir(config):
        pass


def test_an_evaluation_has_a_folder_of_its_own_which_goes_with_the_run(tmp_path: Path) -> None:
    run_dir = old_run(tmp_path / "run")
    own = config_for(run_dir / "eval")
    only = replace(own, evaluation=EvaluationConfig(only=True))
    assert only.checkpoints == run_dir / "checkpoints" and own.checkpoints == run_dir / "eval" / "checkpoints"
    for _ in range(2):
        with opened_dir(config_for(run_dir, resume="auto")), opened_dir(only) as opened:
            (opened / "metrics.jsonl").write_text('{"step": 0}\n')
    assert (run_dir / "metrics.jsonl").read_text() == "old"
    with opened_dir(config_for(run_dir, overwrite=True)):
        assert not (run_dir / "eval").exists()
