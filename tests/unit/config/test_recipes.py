"""Every recipe, of an algorithm or a model, passes the checks; every algorithm and every model that we name has one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import setuptools

from rlx.cli.main import main
from rlx.config.algorithm import PRESETS
from rlx.config.load import load_config
from rlx.config.packaged import packaged
from rlx.config.schema import Config

RECIPES = Path(__file__).resolve().parents[3] / "configs" / "algorithms"


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"ppo"}))
def test_recipe_passes(name: str, run_yaml: Path) -> None:
    base = load_config(str(run_yaml), [])
    overrides = [f"model.path={base.model.path}", f"data.train={base.data.train}", f"evaluation.data={base.data.train}"]
    config = load_config(str(RECIPES / f"{name}.yaml"), [*overrides, "data.max_prompt_tokens=4"])
    assert config.algorithm.name == name


def test_docs_have_a_row_for_each() -> None:
    page = (RECIPES.parents[1] / "docs" / "algorithms.md").read_text()
    assert all(f"| `{name}` |" in page for name in PRESETS)


@pytest.mark.parametrize("name", ["sft", "dpo", "rm"])
def test_fine_tuning_configuration_passes(name: str, run_yaml: Path) -> None:
    base = load_config(str(run_yaml), [])
    overrides = [f"model.path={base.model.path}", f"data.train={base.data.train}", f"evaluation.data={base.data.train}"]
    config = load_config(str(RECIPES.parent / f"{name}.yaml"), overrides)
    assert config.finetune.command == name and config.num_trainer_ranks == 2


MODEL_RECIPES = sorted(path for path in (RECIPES.parent / "recipes").glob("*.yaml") if not path.name.startswith("base"))
# What the compatibility list names.
LISTED = {
    ("Qwen/Qwen2-7B", "ppo"),
    ("Qwen/Qwen2-7B-Instruct", "grpo"),
    ("Qwen/Qwen2.5-7B", "ppo"),
    ("Qwen/Qwen2.5-32B", "dapo"),
    ("meta-llama/Llama-3.1-8B", "ppo"),
    ("meta-llama/Llama-3.1-70B", "ppo"),
    ("meta-llama/Llama-3.1-405B", "ppo"),
    ("google/gemma-2-9b-it", "sft"),
    ("google/gemma-2-9b-it", "grpo"),
    ("google/gemma-2-27b-it", "sft"),
    ("google/gemma-2-27b-it", "grpo"),
    ("deepseek-ai/deepseek-llm-7b-base", "dr_grpo"),
    ("deepseek-ai/deepseek-llm-67b-base", "dr_grpo"),
    ("microsoft/Phi-3-mini-4k-instruct", "rloo"),
    ("microsoft/Phi-3-medium-4k-instruct", "rloo"),
    ("Qwen/Qwen2-57B-A14B", "grpo"),
    ("deepseek-ai/deepseek-moe-16b-base", "grpo"),
    ("01-ai/Yi-1.5-34B-200K", "grpo"),
    ("Qwen/Qwen2.5-VL-3B-Instruct", "grpo"),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "grpo"),
    ("Qwen/Qwen2.5-VL-72B-Instruct", "grpo"),
}
MODELS_PAGE = (RECIPES.parents[1] / "docs" / "models.md").read_text()


def read(recipe: Path) -> tuple[Config, str]:
    """A model's recipe and the name of its objective or algorithm."""
    architectures = packaged("configs/architectures")
    assert architectures is not None
    config = load_config(recipe, [], architectures)
    return config, config.finetune.objective if config.is_finetuning else config.algorithm.name


@pytest.mark.parametrize("recipe", MODEL_RECIPES, ids=lambda path: path.stem)
def test_model_recipe_fits_on_paper(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the packaged shapes, with 5 % of each GPU to spare; its first line and docs/models.md say how many GPUs."""
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--on-paper", str(recipe), "cluster.gpu_memory_gib=76"]) == 0
    told = capsys.readouterr().out
    config, _ = read(recipe)
    gpus = (config.cluster.nodes or 1) * 8
    assert "memory of the fullest trainer rank, GiB: about " in told and f"  path: {config.model.path}\n" in told
    assert re.search(rf"on {gpus} H100s", recipe.read_text().splitlines()[0]) and config.model.path in recipe.read_text()
    row = re.search(rf"^\| `{config.model.path}` \|.*`{recipe.stem}` \| {gpus} \|", MODELS_PAGE, re.MULTILINE)
    assert row, f"docs/models.md lacks | `{config.model.path}` | ... `{recipe.stem}` | {gpus} |"


def test_every_listed_model_has_its_recipe() -> None:
    found = {(config.model.path, algorithm) for config, algorithm in map(read, MODEL_RECIPES)}
    assert found >= LISTED
    longest, _ = read(RECIPES.parent / "recipes" / "yi-1.5-34b-200k.yaml")
    assert longest.data.max_prompt_tokens + longest.rollout.max_new_tokens == 200_000


def test_on_paper_takes_a_folder_or_the_packaged_one_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, shapes = str(RECIPES.parent / "recipes" / "qwen2-7b.yaml"), str(RECIPES.parent / "architectures")
    for arguments in (["--on-paper", recipe, "run.seed=7"], [recipe, "run.seed=7", "--on-paper"], [recipe, "--on-paper", shapes]):
        assert main(["check", *arguments]) == 0, arguments
        assert "path: Qwen/Qwen2-7B\n" in capsys.readouterr().out
    assert main(["check", recipe, "--on-paper", str(tmp_path)]) == 2
    assert f"model.path: --on-paper {tmp_path} has no Qwen2-7B/config.json" in capsys.readouterr().err
    assert main(["check", recipe, "model.path=me/mine", "--on-paper"]) == 2
    assert "it has DeepSeek-V3, Llama-3.1-405B," in capsys.readouterr().err
    assert main(["check", recipe, "--on-paper", "nowhere"]) == 2
    assert "--on-paper: no such folder nowhere" in capsys.readouterr().err


def test_on_paper_needs_no_tokenizer_python_or_data(tmp_path: Path) -> None:
    recipe = str(RECIPES.parent / "recipes" / "qwen2-7b-instruct.yaml")
    elsewhere = ["model.tokenizer_path=/on/the/cluster", "rollout.python=/on/the/cluster/python", "reward.name=mine.py:reward"]
    elsewhere += ["model.reference_path=Qwen/Qwen2-7B", "evaluation.data=far.jsonl", "data.chat_template=far.jinja"]
    assert main(["check", recipe, *elsewhere, "--on-paper"]) == 0


def test_shapes_and_recipes_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(str(RECIPES.parents[1] / "setup.py"))
    monkeypatch.chdir(RECIPES.parents[1])
    files = {name: place for place, names in told["data_files"] for name in names}  # type: ignore[attr-defined]
    for path in [*MODEL_RECIPES, *(RECIPES.parent / "architectures").glob("*/config.json")]:
        name = str(path.relative_to(RECIPES.parents[1]))
        assert files[name] == f"share/rlx/{Path(name).parent}"
