"""Every key has a class for a run that goes on; what each class says of two configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from rlx.config import resume
from rlx.config.convert import all_entries, row_class, section_entries, to_config, to_tree
from rlx.config.schema import Config

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "p.jsonl"}, "reward": {"name": "exact"}}


def config_of(*overrides: str, finetuning: bool = False) -> Config:
    tree = json.loads(json.dumps(BASE | ({"finetune": {"objective": "sft"}} if finetuning else {})))
    for override in overrides:
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        section = tree
        for name in path:
            section = section.setdefault(name, {})
        section[last] = json.loads(value)
    config, problems = to_config(tree)
    assert not problems.messages
    return config


def changes(was: Config, now: Config) -> dict[str, str]:
    return {change.key: change.effect for change in resume.compare(json.loads(json.dumps(to_tree(was))), now)}


def leaf_keys() -> Iterator[str]:
    """Every key that has a value, those of rows as ``SECTION.KEY.NAME.FIELD``."""
    for entry in all_entries():
        if not entry.is_section:
            yield entry.key
            row = row_class(entry.hint)
            yield from (below.key for below in section_entries(row, f"{entry.key}.NAME.")) if row else ()


def test_every_key_is_classed_once_and_no_other() -> None:
    keys = list(leaf_keys())
    assert len(keys) == len(set(keys)) > 150
    assert {resume.effect_of(key) for key in keys} == {
        resume.TAKES_EFFECT, resume.REFUSED, resume.BY_CONTENT, resume.IRRELEVANT
    }  # fmt: skip
    followed = [f"{section}.{name}" for section, names in resume._FOLLOWED.items() for name in names.split()]
    table = [*followed, *resume._REFUSED, *resume._BY_CONTENT, *resume._IRRELEVANT]
    assert sorted(table) == sorted(keys)
    with pytest.raises(KeyError, match=r"run\.fresh"):
        resume.effect_of("run.fresh")


@pytest.mark.parametrize(
    ("override", "effect"),
    [
        ("optimizer.lr=0.5", resume.TAKES_EFFECT),
        ("optimizer.schedule=\"cosine\"", resume.TAKES_EFFECT),
        ("optimizer.distributed=false", resume.TAKES_EFFECT),
        ("run.steps=7", resume.TAKES_EFFECT),
        ("parallel.tp=2", resume.TAKES_EFFECT),
        ("data.prompts_per_step=3", resume.TAKES_EFFECT),
        ("reward.args={\"a\": 1}", resume.TAKES_EFFECT),
        ("run.seed=3", resume.REFUSED),
        ("model.dtype=\"bf16\"", resume.REFUSED),
        ("data.shuffle=false", resume.REFUSED),
        ("model.path=\"other\"", resume.BY_CONTENT),
        ("data.max_prompt_tokens=5", resume.BY_CONTENT),
        ("run.dir=\"elsewhere\"", None),
        ("finetune.beta=0.5", None),
        ("model.reference_path=\"r\"", None),
    ],
)  # fmt: skip
def test_a_changed_key_is_found_with_its_class(override: str, effect: str | None) -> None:
    key = override.partition("=")[0]
    assert changes(config_of(), config_of(override)) == ({} if effect is None else {key: effect})
    assert changes(config_of(override), config_of(override)) == {}


def test_keys_of_a_reference_are_followed_where_there_is_one() -> None:
    base = 'algorithm.kl_placement="loss"'
    was, now = config_of(base), config_of(base, "algorithm.kl_coefficient=0.3", 'model.reference_path="r"')
    assert changes(was, now) == {"model.reference_path": resume.TAKES_EFFECT, "algorithm.kl_coefficient": resume.TAKES_EFFECT}


def test_a_critic_is_followed_where_the_checkpoint_has_it() -> None:
    ppo, grpo, prime = (
        config_of(f'algorithm.name="{name}"', "rollout.samples_per_prompt=2") for name in ("ppo", "grpo", "prime")
    )
    assert changes(ppo, grpo)["algorithm.name"] == resume.TAKES_EFFECT
    assert changes(grpo, ppo)["algorithm.name"] == changes(ppo, prime)["algorithm.name"] == resume.REFUSED


def test_a_steered_coefficient_goes_on_from_where_it_is() -> None:
    adaptive = ['algorithm.kl_controller="adaptive"', 'algorithm.kl_placement="reward"']
    was, now = (config_of(*adaptive, f"algorithm.kl_coefficient={value}") for value in (0.1, 0.2))
    assert changes(was, now) == {"algorithm.kl_coefficient": resume.REFUSED}


def test_sources_are_compared_by_name_and_field() -> None:
    rows = 'data.sources={"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}'
    was = config_of("data.train=null", rows)
    assert changes(was, config_of("data.train=null", rows, "data.sources.a.weight=2.0")) == {
        "data.sources.a.weight": resume.REFUSED
    }
    assert changes(was, config_of("data.train=null", rows, 'data.sources.b.path="c.jsonl"')) == {
        "data.sources.b.path": resume.BY_CONTENT
    }
    assert changes(was, config_of("data.train=null", 'data.sources={"a": {"path": "a.jsonl"}}')) == {
        "data.sources": resume.REFUSED
    }


def test_fine_tuning_has_no_use_for_the_keys_of_rollouts() -> None:
    was = config_of(finetuning=True)
    other = config_of("rollout.temperature=0.5", "data.max_prompt_tokens=5", "critic_optimizer.lr=1.0", finetuning=True)
    assert changes(was, other) == {}
    assert changes(was, config_of("finetune.max_tokens=99", finetuning=True)) == {"finetune.max_tokens": resume.BY_CONTENT}
    assert changes(was, config_of())["finetune.objective"] == resume.REFUSED
    assert changes(config_of(), was)["finetune.objective"] == resume.REFUSED


def test_a_checkpoint_of_an_older_rlx_had_the_defaults_of_keys_that_it_lacks() -> None:
    tree = to_tree(config_of())
    del tree["data"]["template_date"], tree["tracker"]
    tree["run"]["retired"] = 1
    assert resume.compare(tree, config_of()) == []
    assert [change.key for change in resume.compare(tree, config_of('tracker.wandb_project="p"'))] == ["tracker.wandb_project"]


def test_what_is_said() -> None:
    was = to_tree(config_of())
    lr, seed = resume.compare(was, replace(config_of("optimizer.lr=0.5"), run=config_of("run.seed=3").run))[::-1]
    assert str(lr) == "optimizer.lr: 1e-06 -> 0.5"
    said = resume.refusal(seed, "step-00000002")
    assert said.startswith("run.seed: 3, but 0 in step-00000002: the order of the data") and said.endswith("another run.dir")
