"""``dump_config`` of any configuration loads back to an equal one (property test over the whole schema)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlx.config.convert import Entry, row_class, section_entries, to_config, to_tree
from rlx.config.load import dump_config, load_config, read_tree
from rlx.config.options import LARGEST
from rlx.config.schema import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, RunConfig

_TRICKY = ["", "null", "~", "true", "1e-5", "1_000", "0x1f", "${run.seed}", "\\${x}", "\\\\${x}", "a: b", "- a", "#", "=", "a\\",
           "${", "$", "{}", "2026-01-01", "yes", "\n", " x ", "é\u2028", "???x", "1:30"]  # fmt: skip
_TEXT = (st.sampled_from(_TRICKY) | st.text(alphabet="a${}\\'\": \n#é1.-", max_size=8)).filter(lambda text: text != "???")
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_PLAIN = st.none() | st.booleans() | st.integers() | _FLOATS | _TEXT
_BLANK = Config(model=ModelConfig(path="m"), data=DataConfig(train="t"), reward=RewardConfig(name="exact"))
_NAMES = st.text(alphabet="abc-_é 1", min_size=1, max_size=5)
_TREES = st.dictionaries(_NAMES, st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner)))


def _values(entry: Entry, hint: Any) -> st.SearchStrategy[Any]:
    choices, limits = entry.field.metadata["choices"], entry.field.metadata["limits"]
    minimum, maximum = limits.get("minimum", limits.get("above")), limits.get("maximum", limits.get("below"))
    if type(None) in get_args(hint):
        (inner,) = (option for option in get_args(hint) if option is not type(None))
        return st.none() | _values(entry, inner)
    if get_origin(hint) is list:
        return st.lists(_values(entry, get_args(hint)[0]), max_size=3)
    row = row_class(hint)
    if row is not None:
        return st.dictionaries(_NAMES, _configs(row), max_size=2)
    if choices:
        return st.sampled_from(choices)
    if hint is int:
        most = int(LARGEST[int])
        return st.integers(
            min_value=-most if minimum is None else int(minimum), max_value=most if maximum is None else int(maximum)
        )
    if hint is float:
        most = LARGEST[float]
        return st.floats(
            min_value=-most if minimum is None else minimum,
            max_value=most if maximum is None else maximum,
            exclude_min="above" in limits,
            exclude_max="below" in limits,
        )
    if hint is bool:
        return st.booleans()
    if hint is str:
        return _TEXT if entry.field.metadata["may_be_empty"] else _TEXT.filter(lambda text: bool(text.strip()))
    return _TREES


def _configs(section: type = Config) -> st.SearchStrategy[Any]:
    parts = {
        entry.field.name: _configs(entry.hint) if entry.is_section else _values(entry, entry.hint)
        for entry in section_entries(section)
    }
    return st.builds(section, **parts)


# A machine that is busy is no fault of the inputs.
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_configs())
def test_dump_loads_back_to_an_equal_config(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        again, problems = to_config(read_tree(path))
    assert problems.messages == []
    assert again == config
    assert _typed(to_tree(again)) == _typed(to_tree(config))


def _typed(value: Any) -> Any:
    """With types, because 1 == 1.0 == True."""
    if isinstance(value, Mapping):
        return {name: _typed(item) for name, item in value.items()}
    return [_typed(item) for item in value] if isinstance(value, list) else (type(value), value)


def test_dump_spells_out_every_key(run_yaml: Path) -> None:
    tree = OmegaConf.to_container(OmegaConf.create(dump_config(load_config(run_yaml))))
    assert isinstance(tree, dict)
    assert {name: set(section) for name, section in tree.items()} == {
        entry.key: {below.field.name for below in section_entries(entry.hint)} for entry in section_entries(Config)
    }


@settings(max_examples=100)
@given(_TEXT)
def test_text_of_any_look_stays_text(text: str) -> None:
    config = replace(_BLANK, run=RunConfig(dir=text), rollout=RolloutConfig(server_args={"a": {"b": [text]}}))
    again = OmegaConf.to_container(OmegaConf.create(dump_config(config)), resolve=True)
    assert isinstance(again, dict)
    assert (again["run"]["dir"], again["rollout"]["server_args"]) == (text, {"a": {"b": [text]}})
