"""Read a configuration: YAML files and ``key=value`` overrides in, one frozen, checked ``Config`` out.

A file may start with ``defaults: [other.yaml, ...]`` (paths relative to the file): those are merged first, in order,
and the file's own keys win. ``${section.key}`` refers to another key. Everything wrong is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlx.config.checks.contradictions import check
from rlx.config.convert import Problems, to_config, to_tree
from rlx.config.hub.located import located
from rlx.config.schema import Config


class ConfigError(ValueError):
    """The configuration cannot be used. ``problems`` holds one line each; the message is all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), architectures: Path | None = None) -> Config:
    """The checked configuration of ``path`` under ``overrides`` (``section.key=value``, value in YAML).

    Raises ``ConfigError`` listing every problem: unreadable files, unknown keys with the nearest known one, wrong
    types, values out of range, missing keys, and keys that contradict each other. Ids of the hub become paths of local
    copies. With ``architectures`` models and
    prompts need not be here: what the checks ask of models is read from there, see ``on_paper``.
    """
    config, problems = to_config(read_tree(path, overrides))
    if architectures is None:
        config = located(config, problems)
    found = check(on_paper(config, architectures), on_paper=architectures is not None)
    messages = problems.messages + _trusted(found, problems)
    if messages:
        raise ConfigError(messages)
    return config


def on_paper(config: Config, architectures: Path | None) -> Config:
    """The configuration with each model replaced by the folder of ``architectures`` that is called like the last part of its
    path or hub id; as it is without ``architectures``. ConfigError when a model is neither there nor here."""
    if architectures is None:
        return config
    found: dict[str, Any] = {"tokenizer_path": None}
    for key in ("path", "reference_path", "critic_path"):
        given = getattr(config.model, key)
        folders = [architectures / Path(given).name, Path(given)] if given else []
        found[key] = next((str(folder) for folder in folders if os.path.isfile(folder / "config.json")), None)
        if folders and found[key] is None:
            known = sorted(file.parent.name for file in architectures.glob("*/config.json"))
            listed = f"it has {', '.join(known)}" if known else "there is no */config.json"
            raise ConfigError([f"model.{key}: --on-paper {architectures} has no {folders[0].name}/config.json; {listed}"])
    return replace(config, model=replace(config.model, **found), rollout=replace(config.rollout, python=None))


def config_files(path: str | os.PathLike[str]) -> list[Path]:
    """``path``, which has been loaded, and the files that its ``defaults`` bring in."""
    where = Path(path).resolve()
    bases = (yaml.safe_load(where.read_text(encoding="utf-8")) or {}).get("defaults", [])
    return [where, *(file for base in bases for file in config_files(where.parent / base))]


def load_run(run_dir: Path) -> Config:
    """What a run wrote of its configuration when it began; the files that it names need not be here any more."""
    config, problems = to_config(read_tree(run_dir / "config.yaml"))
    if problems.messages:
        raise ConfigError(problems.messages)
    return config


def read_tree(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged and resolved tree, before any typing. Raises ``ConfigError`` for files and overrides that do not parse."""
    merged = _load_file(Path(path), ())
    for override in overrides:
        merged = _apply(merged, override)
    with _named(str(path)):
        tree = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def dump_config(config: Config) -> str:
    """The whole configuration as YAML; loading the text gives an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_tree(config))))


def _trusted(messages: Sequence[str], problems: Problems) -> list[str]:
    """Leave out cross-field complaints about keys that are wrong in themselves: a default stands in for those."""
    wrong = [re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w])") for key in problems.keys]
    return [message for message in messages if not any(pattern.search(message) for pattern in wrong)]


def _load_file(path: Path, including: tuple[Path, ...]) -> DictConfig:
    with _named(str(path)):
        where = Path(os.path.realpath(path))
    if where in including:
        circle = " -> ".join(str(step) for step in (*including[including.index(where) :], where))
        raise ConfigError([f"defaults: {circle} include each other in a circle"])
    with _named(f"{path} (in the defaults of {including[-1]})" if including else str(path)):
        own = OmegaConf.load(where)
    if not isinstance(own, DictConfig):
        raise ConfigError([f"{path}: expected a mapping of sections at the top, got a list"])
    merged = OmegaConf.create({})
    for base in _take_defaults(own, path):
        merged = _merge(merged, _load_file(where.parent / base, (*including, where)), f"{path}: defaults {base}")
    return _merge(merged, own, str(path))


def _take_defaults(own: DictConfig, path: Path) -> list[str]:
    defaults = OmegaConf.to_container(own).get("defaults", [])  # type: ignore[union-attr]
    if not isinstance(defaults, list) or not all(isinstance(item, str) for item in defaults):
        raise ConfigError([f"{path}: defaults: expected a list of YAML files, got {defaults!r}"])
    own.pop("defaults", None)
    return defaults


def _apply(merged: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", key):
        raise ConfigError([f"override {override!r}: expected section.key=value"])
    with _named(f"override {override!r:.200}"):
        return _merge(merged, OmegaConf.from_dotlist([override]), f"override {override!r:.200}")


def _merge(lower: DictConfig, upper: DictConfig, what: str) -> DictConfig:
    with _named(what):
        merged = OmegaConf.merge(lower, upper)
    assert isinstance(merged, DictConfig)
    return merged


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever YAML, OmegaConf and the file system raise in here is a ConfigError about ``what``."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError([f"{what}: cannot be read: {error.strerror or error}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{what}: nests too deep"]) from error
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key or what}: {str(error).partition(chr(10))[0]}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{what}: not valid YAML: {' '.join(str(error).split())}"]) from error
    except ValueError as error:
        raise ConfigError([f"{what}: cannot be read: {error}"]) from error


def _escaped(value: Any) -> Any:
    """Guard text that only looks like an interpolation, so that it is read back as text."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
