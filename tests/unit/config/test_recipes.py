"""Every recipe of an algorithm is a configuration that passes the checks, and every algorithm has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlx.config.algorithm import PRESETS
from rlx.config.load import load_config

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
