"""Files, overrides and typing: what is accepted, and that everything else is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlx.config.convert import Entry, all_entries
from rlx.config.document import document
from rlx.config.load import ConfigError, load_config
from rlx.config.options import nearest_key

Problems = Callable[..., tuple[str, ...]]
ROOT = Path(__file__).resolve().parents[3]


def test_minimal_file_takes_the_schema_defaults(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    assert (config.rollout.samples_per_prompt, config.optimizer.lr, config.rollout.server_args) == (1, 1e-6, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1  # type: ignore[misc]


def test_overrides_convert_naturally(run_yaml: Path) -> None:
    overrides = (
        "optimizer.lr=1e-5", "algorithm.kl_horizon=300", "algorithm.value_clip=null", "critic_optimizer.lr='2e-4'",
        "rollout.stop_token_ids=[1, 2]", "rollout.server_args.tp-size=2", "run.seed=3", "run.seed=4",
        "run.dir=/tmp/x=y", "optimizer.clip_grad=${algorithm.kl_horizon}",
    )  # fmt: skip
    config = load_config(run_yaml, overrides)
    assert config.optimizer.lr == 1e-5 and config.critic_optimizer.lr == 2e-4
    assert type(config.algorithm.kl_horizon) is float and config.algorithm.value_clip is None
    assert config.rollout.stop_token_ids == [1, 2] and config.rollout.server_args == {"tp-size": 2}
    assert config.run.seed == 4 and config.run.dir == "/tmp/x=y"
    assert config.optimizer.clip_grad == 300.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps=two", ["run.steps", "an integer", "'two' (str)"]),
        ("run.steps=1.5", ["run.steps", "an integer", "1.5 (float)"]),
        ("run.steps=true", ["run.steps", "an integer", "True (bool)"]),
        ("run.steps=0", ["run.steps", "at least 1", "got 0"]),
        ("run.steps=null", ["run.steps", "an integer", "null"]),
        ("run.steps=???", ["run.steps", "left open"]),
        ("run.export_hf=1", ["run.export_hf", "true or false", "1 (int)"]),
        ("run.dir=7", ["run.dir", "a string", "7 (int)"]),
        ("optimizer.lr=true", ["optimizer.lr", "a number", "True (bool)"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "a number"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "a number"]),
        ("optimizer.lr=nan", ["optimizer.lr", "a number", "got 'nan' (str)"]),
        ("run.resume=always", ["run.resume", "auto, never", "'always'"]),
        ("parallel.etp=0", ["parallel.etp", "at least 1"]),
        ("rollout.stop_token_ids=[1, x]", ["rollout.stop_token_ids[1]", "an integer", "'x'"]),
        ("rollout.stop_token_ids=5", ["rollout.stop_token_ids", "a list"]),
        ("rollout.server_args=5", ["rollout.server_args", "a mapping"]),
        ("rollout.server_args.a.b=.inf", ["rollout.server_args.a.b", "finite"]),
        ("rollout=null", ["rollout", "a section", "null"]),
        ("rollout.max_new_token=5", ["rollout.max_new_token", "unknown", "rollout.max_new_tokens"]),
        ("sampels_per_prompt=5", ["sampels_per_prompt", "unknown", "rollout.samples_per_prompt"]),
        ("algorithms.name=ppo", ["algorithms", "unknown", "nearest one is algorithm"]),
        ("optimizer.foo=1", ["optimizer.foo", "unknown key; optimizer has lr, min_lr, "]),
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "unknown key; optimizer has lr, min_lr, "]),
        ("optimizer.steps=1", ["optimizer.steps", "the nearest one is "]),
        ("foo.bar=1", ["foo", "unknown key; the sections are model, data, reward, run, "]),
        ("optimizer.lr=${optimizer.nope}", ["optimizer.lr", "nope"]),
        ("model.path=null", ["model.path", "required"]),
        ("run.steps", ["run.steps", "section.key=value"]),
        ("run.steps=[1,", ["run.steps=[1,", "not valid YAML"]),
    ],
)
def test_one_wrong_key_is_one_problem_that_names_it(problems: Problems, override: str, words: list[str]) -> None:
    (problem,) = problems(override)
    assert all(word in problem for word in words), problem


def test_all_problems_come_together_one_a_line(run_yaml: Path) -> None:
    run_yaml.write_text("data: {train: nowhere.csv, x: 1}\nrun: {steps: -1}\nrollout: {top_p: 0.5, num_engines: q}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml)
    lines = str(caught.value).splitlines()
    expected = {"model.path", "data.x", "run.steps", "rollout.num_engines", "reward.name", "rollout.top_p", "data.train"}
    assert {line.split(":")[0] for line in lines} == expected
    assert len(lines) == len(expected)


def test_cross_field_complaints_about_a_wrong_key_are_left_out(problems: Problems) -> None:
    assert problems("parallel.sequence_parallel=true", "parallel.tp=two") == (
        "parallel.tp: expected an integer, got 'two' (str)",
    )


def test_a_row_that_is_wrong_is_no_missing_section(problems: Problems) -> None:
    assert problems("data.train=null", "data.sources={a: {path: a.jsonl, weight: 0}}") == (
        "data.sources.a.weight: must be above 0, got 0.0",
    )


_TEXTS = [entry for entry in all_entries() if entry.hint in (str, str | None) and not entry.field.metadata["choices"]]


@pytest.mark.parametrize("entry", _TEXTS, ids=lambda entry: entry.key)
@pytest.mark.parametrize("blank", ["''", "' '"])
def test_an_empty_text_is_refused_unless_it_means_something(problems: Problems, entry: Entry, blank: str) -> None:
    found = [line for line in problems(f"{entry.key}={blank}") if line.startswith(f"{entry.key}: must not be empty")]
    assert len(found) == (entry.key not in ("data.system_prompt", "reward.name", "cluster.ray_address"))


def test_defaults_merge_in_order_and_yield_to_the_file(run_yaml: Path) -> None:
    (run_yaml.parent / "sub").mkdir()
    (run_yaml.parent / "sub" / "a.yaml").write_text("defaults: [b.yaml]\nrun: {seed: 1, steps: 11}\n")
    (run_yaml.parent / "sub" / "b.yaml").write_text("run: {seed: 2, steps: 22, dir: from_b}\n")
    (run_yaml.parent / "c.yaml").write_text("run: {seed: 3}\n")
    run_yaml.write_text("defaults: [sub/a.yaml, c.yaml]\nrun: {resume: auto}\n" + run_yaml.read_text())
    run = load_config(run_yaml, ["run.seed=${run.steps}"]).run
    assert (run.seed, run.steps, run.dir, run.resume) == (11, 11, "from_b", "auto")
    assert load_config(run_yaml).run.seed == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults: [other.yaml]", "circle"),
        ("defaults: [none.yaml]", "none.yaml"),
        ("defaults: other.yaml", "a list"),
        ("- 1", "a mapping"),
        ("a: [", "not valid YAML"),
        ("run: {}\nrun: {}", "duplicate"),
    ],
)
def test_unusable_files_are_named(run_yaml: Path, text: str, words: str) -> None:
    (run_yaml.parent / "other.yaml").write_text(f"defaults: [{run_yaml.name}]")
    run_yaml.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(run_yaml)


def test_a_circle_is_shown_without_the_files_that_lead_to_it(run_yaml: Path) -> None:
    (run_yaml.parent / "other.yaml").write_text("defaults: [other.yaml]")
    run_yaml.write_text("defaults: [other.yaml]")
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml)
    assert run_yaml.name not in str(caught.value) and str(caught.value).count("other.yaml") == 2


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml"):
        load_config(tmp_path / "nope.yaml")


def test_nearest_key_prefers_the_right_name_in_the_wrong_section() -> None:
    known = ["optimizer.lr", "optimizer.min_lr", "rollout.max_new_tokens", "data.max_prompt_tokens", "run.seed"]
    assert nearest_key("data.max_new_tokens", known) == "rollout.max_new_tokens"
    assert nearest_key("optimiser.lr", known) == "optimizer.lr"
    assert nearest_key("seed", known) == "run.seed"
    assert nearest_key("optimizer.top_p", ["optimizer.eps", "rollout.top_k", "rollout.top_p"]) == "rollout.top_p"


def test_configuration_and_check_command_import_no_torch() -> None:
    code = (
        "import sys, rlx.config.document, rlx.config.load, rlx.cli.main, rlx.cli.check;"
        "print([m for m in ('torch', 'transformers', 'rlx.types.batch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_the_page_of_keys_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == document(), "run: python -m rlx.config.document > docs/config.md"
