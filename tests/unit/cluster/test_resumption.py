"""What a launcher finds before it starts a process of a run that goes on: keys, models, tokenizer, data, the day of templates."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.arch.families.registry import architecture_of
from rlx.arch.sizes import expected_shapes
from rlx.cli.main import main
from rlx.cluster.preflight import preflight, resumption_problems
from rlx.cluster.resumption import nothing_left
from rlx.config.convert import to_tree
from rlx.config.load import ConfigError, dump_config
from rlx.config.parts import loaded_models
from rlx.config.schema import AlgorithmConfig, Config, DataConfig, FinetuneConfig, ModelConfig, RewardConfig, RunConfig
from rlx.data.examples import ExampleSource
from rlx.data.prompts import PromptSource
from rlx.data.tokenizer import tokenizer_of
from rlx.driver.checkpoint import write_checkpoint
from rlx.models.hf.fingerprint import model_fingerprint, origin_of
from tests.parts import reader_of

DAY = "2025-01-31"


def make_model(folder: Path, words: str = "abcd", seed: int = 0) -> Path:
    folder.mkdir()
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4, "vocab_size": len(words) + 4}
    more = {
        "num_key_value_heads": 1,
        "intermediate_size": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
    }
    config = {"model_type": "qwen2", **shape, **more}
    (folder / "config.json").write_text(json.dumps(config))
    drawn = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(architecture_of(config))
    save_file({name: torch.randn(size, generator=drawn) for name, size in shapes.items()}, folder / "model.safetensors")
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "?"])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="?", chat_template=template).save_pretrained(
        folder
    )
    return folder


def save_policy(folder: str) -> None:
    (Path(folder) / "policy").mkdir()
    (Path(folder) / "policy" / "metadata.json").write_text("{}")


@pytest.fixture(params=["rl", "sft"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """The configuration of a run of which ``tmp_path / "run"`` holds a checkpoint of step 2."""
    rows = [{"prompt": "a " * (index + 1), "response": "b", "label": "b"} for index in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(path=str(make_model(tmp_path / "model"))),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), template_date=DAY),
        reward=RewardConfig(name="exact"),
        algorithm=AlgorithmConfig(name="grpo", kl_placement="loss", kl_coefficient=0.1),
        finetune=FinetuneConfig(objective="sft" if request.param == "sft" else "none"),
        run=RunConfig(dir=str(tmp_path / "run"), resume="auto"),
    )
    tokenizer = tokenizer_of(config.model, config.data)
    origin = origin_of(loaded_models(config), tokenizer)
    state: dict[str, Any] = {"step": 2, "seed": 0, "config": to_tree(config), "origin": origin}
    if config.is_finetuning:
        state["examples"] = ExampleSource(config.examples_path, reader_of(config, tokenizer), 0).state()
    else:
        state["prompts"] = PromptSource(config.data, tokenizer, 0).state()
    write_checkpoint(tmp_path / "run" / "checkpoints", 2, state, save_policy, keep=1)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    return config


def with_model(config: Config, **keys: Any) -> Config:
    return replace(config, model=replace(config.model, **keys))


def with_data(config: Config, **keys: Any) -> Config:
    return replace(config, data=replace(config.data, **keys))


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        preflight(config)
    return str(error.value)


def test_the_same_run_goes_on_wherever_its_files_are(saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight(saved) == saved
    assert "resume with" not in capsys.readouterr().err
    for name in ("model", "rows.jsonl", "run"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = with_data(with_model(saved, path=str(tmp_path / "moved-model")), train=str(tmp_path / "moved-rows.jsonl"))
    moved = replace(moved, run=replace(moved.run, dir=str(tmp_path / "moved-run")))
    assert preflight(moved) == moved
    said = capsys.readouterr().err
    assert f"rlx: resume with model.path: {tmp_path}/model -> {tmp_path}/moved-model" in said and "data.train" in said


def test_what_takes_effect_is_told_and_a_refused_key_is_an_error(saved: Config, capsys: pytest.CaptureFixture[str]) -> None:
    faster = replace(saved, optimizer=replace(saved.optimizer, lr=0.5), run=replace(saved.run, steps=7))
    assert preflight(faster) == faster
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" not in line] == [
        "rlx: resume with run.steps: 100 -> 7",
        "rlx: resume with optimizer.lr: 1e-06 -> 0.5",
    ]
    assert "run.seed: 4, but 0 in the run that" in refused(replace(saved, run=replace(saved.run, seed=4)))


def at_steps(config: Config, steps: int, **keys: Any) -> Config:
    return replace(config, run=replace(config.run, steps=steps, **keys))


def left_of(config: Config) -> str | None:
    return nothing_left(config.run, config.checkpoints, evaluates=config.evaluation.only)


def test_a_run_that_has_gone_further_is_refused(saved: Config) -> None:
    past = at_steps(saved, 1)
    words = f"run.steps: 1, but the run that {saved.run.dir} holds is at step 2 already (step-00000002); raise run.steps"
    assert refused(past).startswith(words)
    assert [problem for problem in resumption_problems(past, None) if problem.startswith(words)]
    assert not resumption_problems(at_steps(saved, 2), None)


def test_a_run_at_its_end_starts_nothing_unless_its_model_is_to_be_written(saved: Config, tmp_path: Path) -> None:
    done = at_steps(saved, 2)
    assert left_of(done) is None  # there is no export
    assert "is at step 2 = run.steps; raise run.steps to go on" in (left_of(at_steps(saved, 2, export_hf=False)) or "")
    assert left_of(at_steps(saved, 3, export_hf=False)) is None
    assert left_of(at_steps(saved, 2, export_hf=False, resume="never")) is None
    (tmp_path / "run" / "hf").mkdir()
    assert left_of(done) is not None
    os.utime(tmp_path / "run" / "hf", (1, 1))
    assert left_of(done) is None  # it is that of an earlier end
    only = replace(done, evaluation=replace(done.evaluation, only=True))
    os.utime(tmp_path / "run" / "hf")
    assert left_of(only) is None


def test_the_command_says_that_nothing_is_left(saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "sft" if saved.is_finetuning else "train"
    for steps, status, said in ((2, 0, "nothing to do: "), (1, 2, "rlx: error: run.steps: 1, but")):
        (tmp_path / "run.yaml").write_text(dump_config(at_steps(saved, steps, export_hf=False)))
        assert main([command, str(tmp_path / "run.yaml"), "rollout.samples_per_prompt=2"]) == status
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("change", "part"), [({"seed": 1}, "weights"), ({"words": "abcde"}, "config.json"), ({"words": "abdc"}, "tokenizer")]
)
def test_another_model_or_vocabulary_is_refused(saved: Config, tmp_path: Path, change: dict[str, Any], part: str) -> None:
    other = make_model(tmp_path / "other", **change)
    said = refused(with_model(saved, path=str(other)))
    assert said.startswith("model.path: ") and part in said and "begin a new run" in said
    shutil.rmtree(tmp_path / "model")
    other.rename(tmp_path / "model")  # other files under the same name
    assert part in refused(saved)


def test_another_reference_is_followed_where_it_is_asked_for(saved: Config, tmp_path: Path) -> None:
    if saved.is_finetuning:
        return
    other = make_model(tmp_path / "other", seed=1)
    assert preflight(with_model(saved, reference_path=str(other))).model.reference_path == str(other)


def _swap(rows: list[str]) -> list[str]:
    return [*rows[1:], rows[0]]


@pytest.mark.parametrize("edit", [lambda rows: rows[:5], _swap, lambda rows: [*rows[:5], rows[0]]])
def test_other_rows_are_refused(saved: Config, tmp_path: Path, edit: Callable[[list[str]], list[str]]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(edit(file.read_text().splitlines(keepends=True))))
    assert f"data.train: {file} is not what it was when the state was saved" in refused(saved)


def test_a_limit_is_followed_unless_it_changes_which_rows_are_used(saved: Config) -> None:
    def limited(num: int) -> Config:
        if saved.is_finetuning:
            return replace(saved, finetune=replace(saved.finetune, max_tokens=num))
        return with_data(saved, max_prompt_tokens=num)

    assert preflight(limited(50)) == limited(50)
    key = "finetune.max_tokens" if saved.is_finetuning else "data.max_prompt_tokens"
    assert f"(changed: {key}: 1024 -> 4)" in refused(limited(4))


def test_the_day_of_templates_is_that_of_the_first_start(saved: Config, tmp_path: Path) -> None:
    anew = with_data(saved, template_date=None)
    assert preflight(anew).data.template_date == DAY
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # ended before its first checkpoint
    assert preflight(anew).data.template_date == DAY
    fresh = replace(anew, run=replace(anew.run, resume="never", overwrite=True))
    assert preflight(fresh).data.template_date == date.today().isoformat()


def test_an_older_checkpoint_goes_on_with_a_line_about_what_is_not_known(
    saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (tmp_path / "run").glob("checkpoints/*/driver.json")
    state = json.loads(file.read_text())
    del state["config"], state["origin"]
    state.get("examples", {}).pop("rows", None)
    file.write_text(json.dumps(state))
    assert "data.shuffle: false, but true" in refused(with_data(saved, shuffle=False))  # RUN_DIR/config.yaml knows
    (tmp_path / "run" / "config.yaml").unlink()
    capsys.readouterr()
    assert preflight(with_data(saved, template_date=None)).data.template_date == date.today().isoformat()
    said = capsys.readouterr().err
    assert "could not be compared: the configuration, the models and the tokenizer" in said and "data.template_date" in said
    assert ("the rows of data.train" in said) == saved.is_finetuning


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": 2, "seed": 0}', "[" * 10**5, "\ud800"])
def test_a_broken_checkpoint_is_named(saved: Config, tmp_path: Path, content: str) -> None:
    (file,) = (tmp_path / "run").glob("checkpoints/*/driver.json")
    file.write_text(content, errors="surrogatepass")
    assert f"{file.parent} cannot be resumed: {file}" in refused(saved)
    alone = replace(saved, evaluation=replace(saved.evaluation, only=True, data=str(tmp_path / "rows.jsonl")))
    assert str(file) in refused(alone)


def test_a_checkpoint_without_its_models_is_named(saved: Config, tmp_path: Path) -> None:
    (file,) = (tmp_path / "run").glob("checkpoints/*/policy/metadata.json")
    if not saved.is_finetuning:
        with_critic = replace(saved, algorithm=replace(saved.algorithm, name="ppo"))
        driver = file.parents[1] / "driver.json"
        driver.write_text(json.dumps({**json.loads(driver.read_text()), "config": to_tree(with_critic)}))
        assert "critic is not whole" in refused(with_critic)
    file.unlink()
    assert f"{file.parent} is not whole, metadata.json is missing" in refused(saved)


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_is_not_as_it_was_written_is_named(saved: Config, tmp_path: Path, is_gone: bool) -> None:
    (driver,) = (tmp_path / "run").glob("checkpoints/*/driver.json")
    state = json.loads(driver.read_text())
    assert state["files"] == {str(file.relative_to(driver.parent)): 2 for file in driver.parent.glob("*/*")}
    file = driver.parent / "policy" / "metadata.json"
    other = driver.parent / "policy" / "__0_0.distcp"
    other.write_bytes(b"1234")
    driver.write_text(json.dumps({**state, "files": {**state["files"], "policy/__0_0.distcp": 4}}))
    assert file.exists()
    if is_gone:
        other.unlink()
        assert f"{other} is missing" in refused(saved)
    else:
        other.write_bytes(b"123")
        assert f"{other} has 3 bytes, 4 were written" in refused(saved)


def test_a_checkpoint_of_another_kind_is_named(saved: Config, tmp_path: Path) -> None:
    """An older one, of which no configuration says so."""
    (file,) = (tmp_path / "run").glob("checkpoints/*/driver.json")
    state = json.loads(file.read_text())
    del state["config"]
    other = "prompts" if saved.is_finetuning else "examples"
    state[other] = state.pop("examples" if saved.is_finetuning else "prompts")
    file.write_text(json.dumps(state))
    (tmp_path / "run" / "config.yaml").unlink()
    assert f"{file.parent} was saved by a run of another kind" in refused(saved)


def test_those_who_start_nothing_compare_files_that_they_read_whole(saved: Config, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(_swap(file.read_text().splitlines(keepends=True))))
    for num_rows in (None, 6):
        (problem,) = resumption_problems(saved, num_rows)
        assert problem.startswith(f"data.train: {file} is not what it was")
    assert resumption_problems(saved, 5) == []
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages }}")
    for num_rows in (None, 6, 5):
        (problem,) = resumption_problems(with_data(saved, chat_template=str(template)), num_rows)
        assert problem.startswith("data.chat_template: the chat template is another")


def test_a_model_is_known_by_what_it_holds(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "whole")
    weights = {"a": torch.arange(32.0).view(8, 4), "b": torch.arange(8.0)}
    save_file(weights, folder / "model.safetensors")
    whole = model_fingerprint(str(folder))
    parts = make_model(tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    for name, tensor in weights.items():
        save_file({name: tensor}, parts / f"{name}.safetensors")
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f"{n}.safetensors" for n in weights}}))
    assert model_fingerprint(str(parts)) == whole
    save_file(weights | {"b": weights["b"].bfloat16()}, folder / "model.safetensors")
    changed = model_fingerprint(str(folder))
    assert changed["config.json"] == whole["config.json"] and changed["tensors"] != whole["tensors"]
