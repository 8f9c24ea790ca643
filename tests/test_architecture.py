"""The house rules, read from the source: layers, fences, budgets. Each rule is shown to bite.

A rule is a function from one ``Source`` to complaints; ``RULES`` runs on every file, and the synthetic sources at the end
prove each of them. An exception stands in a table here, with its reason, and must still be needed.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.references import unused_functions
from tests.statements import statements

ROOT = Path(__file__).resolve().parent.parent

# What each package may import of its siblings. Lower rows only.
LEVELS = [
    {"cli"},
    {"cluster"},
    {"driver"},
    {"engines"},
    {"processes"},
    {"placement"},
    {"trainer"},
    {"sync"},
    {"models", "rollout", "parallel"},
    {"algos", "data", "rewards"},
    {"config", "obs"},
    {"arch"},
    {"types"},
]
SIBLINGS = {
    ("models", "parallel"): "models are built from parallel's process groups and layouts",
    ("obs", "config"): "trackers are chosen by the configuration",
}
THIRD_PARTY = {
    "megatron": {"parallel", "models"},
    "transformer_engine": {"parallel", "models"},
    "apex": {"parallel", "models"},
    "sglang": {"rollout"},
    "ray": {"cluster"},
    "wandb": {"obs"},
    "tensorboard": {"obs"},
    "torch.utils.tensorboard": {"obs"},
}
OUTSIDE = ("converters", "launch", "tests", "setup")
TORCH_FREE = ("torch", "transformers", "megatron", "rlx.types.batch", "rlx.types.weights")
TORCH_FREE_PACKAGES = {"config", "arch", "placement"}
TORCH_FREE_FILES = {"rlx/types/layout.py", "rlx/types/precision.py", "rlx/types/rollout.py"}
PARALLEL_STATE_HOME = "rlx/parallel/context.py"
ENVIRONMENT_HOMES = {"config", "cluster", "engines", "processes"}
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_MODULES = 400, 60, 6, 14
# Wiring takes the whole configuration: parameters, fields and attributes that are a ``Config``, outside these places.
CONFIG_HOMES = ("rlx/config/", "rlx/cli/", "rlx/driver/run.py")
MAX_CONFIG_HOLDERS = 15
# Folders of equals, which a reader need not have read all of to find one.
LIBRARIES = {"rlx/cli": "commands", "rlx/algos": "algorithms", "rlx/arch/families": "families", "rlx/rewards": "verifiers"}
# Methods that others call by names of their own.
CALLED_FROM_ELSEWHERE = {"rlx/parallel/cpu_backend.py:_Stream": "Megatron takes it for a CUDA stream or event"}

LATE_IMPORTS = {
    "converters/__main__.py:_megatron": "Megatron must find the device settled; who is refused does not wait",
    "rlx/cli/check.py:_look": "it imports transformers, inside torch_hidden",
    "rlx/cli/driver.py:main": "torch comes in once the parent is watched and the GPUs are hidden",
    "rlx/cli/export_rank.py:main": "Megatron must find the device settled when it is imported",
    "rlx/cli/score_rank.py:main": "Megatron must find the device settled when it is imported",
    "rlx/cli/train.py:_ray": "Ray takes seconds to import; only when it is the launcher",
    "rlx/cli/worker.py:_main_from_config": "only where torchrun started the process",
    "rlx/cli/worker.py:_run_rank": "torch and Megatron, once the parent is watched and the device settled",
    "rlx/cluster/ray/actors.py:open_store": "an actor of engines needs no torch",
    "rlx/cluster/ray/actors.py:run": "Megatron must find device and environment settled when it is imported",
    "rlx/cluster/ray/actors.py:_serve": "an actor of trainers needs no engines",
    "rlx/cluster/preflight.py:inspect": "it imports torch; only where a loss or advantage is named",
    "rlx/config/hub/located.py:model_folder": "huggingface_hub takes a second to import; only for what is not here",
    "rlx/config/hub/located.py:data_path": "the same",
    "rlx/data/tasks.py:_reasoning_gym": "an extra, and it takes seconds to import; only when a source asks for it",
    "rlx/rewards/reasoning_gym.py:_load": "an extra, and it takes seconds to import; only when it is the verifier",
    "rlx/models/vision.py:_module_of": "transformers' models take seconds to import; only where there is a tower",
    "rlx/obs/trackers.py:__init__": "wandb is an extra, and TensorBoard takes a second to import; both only when asked for",
    "rlx/parallel/cpu_backend.py:_answer_megatron": "must run after the torch patches above it: Megatron reads them on import",
}
OVER_BUDGET: dict[str, str] = {
    "rlx/rollout/sglang/weight_group.py:join_weight_group": "the facts of a rendezvous, all by keyword, as engines spell them",
}

TOP_FOLDERS = {"rlx", "configs", "launch", "converters", "tests", "docs"}
TOP_FILES = {"Dockerfile", "setup.py", "README.md", "LICENSE", "Makefile", "pyproject.toml"}
# Made by running things here; git ignores them.
TOP_LEVEL_MADE = {"rlx.egg-info", "runs", "build", "__pycache__", "my-task"}


@dataclass(frozen=True)
class Source:
    """One file: its path from the root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """The package below rlx ("" for rlx/__init__.py); the top folder elsewhere."""
        parts = Path(self.path).with_suffix("").parts
        if parts[0] != "rlx":
            return parts[0]
        return "" if parts[1] == "__init__" else parts[1]

    @property
    def in_rlx(self) -> bool:
        return self.path.startswith("rlx/")

    def imports(self) -> Iterator[str]:
        """Every imported module, and every ``module.name`` of a from-import, with relative ones made absolute."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = Path(self.path).parts[: -node.level]
                    base = ".".join((*above, base)).rstrip(".")
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
                yield name

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _imported_by_call(node: ast.Call) -> str:
    """The module of ``import_module("...")`` or ``__import__("...")``; "" for other calls."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
    first = node.args[0] if node.args else None
    if called not in ("import_module", "__import__") or not isinstance(first, ast.Constant):
        return ""
    return first.value if isinstance(first.value, str) else ""


def _is_late(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Call) and bool(_imported_by_call(node)))


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _level(package: str) -> int | None:
    return next((number for number, level in enumerate(LEVELS) if package in level), None)


def layers(source: Source) -> Iterator[str]:
    """Imports inside rlx point to lower rows, to the own package, or along a listed sibling pair."""
    if not source.in_rlx or not source.package:
        return
    own = _level(source.package)
    if own is None:
        yield f"package {source.package} has no level; give it one in LEVELS"
        return
    for target in {name.split(".")[1] for name in source.imports() if name.startswith("rlx.")}:
        level = _level(target)
        allowed = target == source.package or (source.package, target) in SIBLINGS or (level is not None and level > own)
        if not allowed and level is not None:
            yield f"{source.package} must not import {target}"


def outside(source: Source) -> Iterator[str]:
    """rlx never imports what stands beside it."""
    if source.in_rlx:
        yield from (f"imports {name}" for name in source.imports() for top in OUTSIDE if _is_within(name, top))


def third_party(source: Source) -> Iterator[str]:
    """Each heavy dependency has its packages; converters may use Megatron too."""
    for name in source.imports():
        for dependency, homes in THIRD_PARTY.items():
            if dependency == "megatron" and source.package == "converters":
                continue
            if _is_within(name, dependency) and source.package not in homes:
                yield f"imports {name}; {dependency} belongs to {', '.join(sorted(homes))}"


def parallel_state(source: Source) -> Iterator[str]:
    """Megatron's globals have one home."""
    if source.path == PARALLEL_STATE_HOME:
        return
    banned = ("megatron.core.parallel_state", "megatron.core.mpu")
    yield from (f"imports {name}" for name in source.imports() if any(_is_within(name, ban) for ban in banned))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in banned:
            yield f"uses {ast.unparse(node)}"


def environment(source: Source) -> Iterator[str]:
    """Only the configuration and what starts processes look at environment variables."""
    if not source.in_rlx or source.package in ENVIRONMENT_HOMES:
        return
    yield from (f"imports {name}" for name in source.imports() if name in {f"os.{item}" for item in ENVIRONMENT_NAMES})
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES and ast.unparse(node.value) == "os":
            yield f"uses os.{node.attr}"


def torch_free_config(source: Source) -> Iterator[str]:
    """The configuration is read by processes that must start in no time."""
    if source.in_rlx and (source.package in TORCH_FREE_PACKAGES or source.path in TORCH_FREE_FILES):
        yield from (f"imports {name}" for name in source.imports() for ban in TORCH_FREE if _is_within(name, ban))


def no_utils(source: Source) -> Iterator[str]:
    """A name that says nothing collects everything."""
    if any(Path(part).stem in {"utils", "util", "helpers", "misc"} for part in Path(source.path).parts):
        yield "is called utils, or as little"


def late_imports(source: Source) -> Iterator[str]:
    """An import inside a function hides a cycle or a cost; each needs a reason."""
    for function in source.functions():
        late = [node for node in ast.walk(function) if _is_late(node)]
        if late and f"{source.path}:{function.name}" not in LATE_IMPORTS:
            yield f"{function.name} imports inside: {ast.unparse(late[0])}"


def budgets(source: Source) -> Iterator[str]:
    """Files, functions and parameter lists that a reader can hold in mind."""
    lines = source.text.count("\n")
    if lines > MAX_FILE_LINES and source.path not in OVER_BUDGET:
        yield f"has {lines} lines, more than {MAX_FILE_LINES}"
    for function in source.functions():
        if f"{source.path}:{function.name}" in OVER_BUDGET:
            continue
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield f"{function.name} has {length} lines, more than {MAX_FUNCTION_LINES}"
        spec = function.args
        names = [argument.arg for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MAX_PARAMETERS:
            yield f"{function.name} has {count} parameters, more than {MAX_PARAMETERS}"


def config_holders(source: Source) -> list[str]:
    """Where the whole ``Config`` is taken or held: parameters, fields and attributes of that type, and attributes that are
    given such a parameter. Alone or as a part of another type."""
    if not source.in_rlx or source.path.startswith(CONFIG_HOMES):
        return []
    fields = [node for node in ast.walk(source.tree) if isinstance(node, ast.AnnAssign) and _names_config(node.annotation)]
    found = [f"{node.lineno}: {ast.unparse(node)}" for node in fields]
    for function in source.functions():
        spec = function.args
        arguments = (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg)
        taken = {argument.arg for argument in arguments if argument is not None and _names_config(argument.annotation)}
        found += [f"{function.lineno}: {function.name}({name})" for name in sorted(taken)]
        assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        found += [f"{node.lineno}: {ast.unparse(node)}" for node in assignments if _keeps_one_of(taken, node)]
    return found


def _names_config(annotation: ast.AST | None) -> bool:
    """Whether a type is, or mentions, ``Config``; in quotes too."""
    for node in () if annotation is None else ast.walk(annotation):
        if isinstance(node, ast.Name | ast.Attribute) and (node.id if isinstance(node, ast.Name) else node.attr) == "Config":
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _names_config(ast.parse(node.value, mode="eval")):
            return True
    return False


def _keeps_one_of(names: set[str], node: ast.Assign) -> bool:
    """Whether an assignment gives one of these names to an attribute, alone or side by side with others."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += zip(target.elts, node.value.elts, strict=False)
        else:
            pairs.append((target, node.value))
    return any(isinstance(to, ast.Attribute) and isinstance(of, ast.Name) and of.id in names for to, of in pairs)


def crowded_folders(paths: list[str]) -> dict[str, int]:
    """Folders of more modules than a reader can hold in mind, but for libraries; ``__init__.py`` counts for none."""
    counts = Counter(str(Path(path).parent) for path in paths if Path(path).name != "__init__.py")
    return {folder: count for folder, count in counts.items() if count > MAX_MODULES and folder not in LIBRARIES}


def unknown_top_level(names: set[str]) -> set[str]:
    """Visible names at the top that have no place there."""
    return {name for name in names if not name.startswith(".")} - TOP_FOLDERS - TOP_FILES - TOP_LEVEL_MADE


def unmapped_packages(packages: set[str], readme: str) -> set[str]:
    """Packages that the README's file map does not mention as ``rlx/NAME/``."""
    return {package for package in packages if f"rlx/{package}/" not in readme}


Rule = Callable[[Source], Iterator[str]]
RULES: list[Rule] = [
    layers, outside, third_party, parallel_state, environment, torch_free_config, no_utils, late_imports, budgets
]  # fmt: skip
PRODUCT = ("rlx", "converters", "launch")


def product_sources() -> list[Source]:
    paths = [path for top in PRODUCT for path in sorted((ROOT / top).rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_product_keeps_the_rule(rule: Rule) -> None:
    complaints = [f"{source.path}: {complaint}" for source in product_sources() for complaint in rule(source)]
    assert not complaints, "\n".join(complaints)


def test_exceptions_are_still_needed() -> None:
    sources = {source.path: source for source in product_sources()}
    for place, reason in LATE_IMPORTS.items():
        path, _, name = place.partition(":")
        named = [function for function in sources[path].functions() if function.name == name]
        assert reason
        assert any(_is_late(node) for function in named for node in ast.walk(function)), place
    assert all(reason and place.partition(":")[0] in sources for place, reason in OVER_BUDGET.items())


def test_no_folder_is_crowded() -> None:
    paths = [source.path for source in product_sources()]
    assert not crowded_folders(paths)
    assert all(reason and any(path.startswith(f"{folder}/") for path in paths) for folder, reason in LIBRARIES.items())


def test_no_function_is_there_for_tests_alone() -> None:
    sources = {source.path: source.text for source in product_sources()}
    around = {path: text for path, text in sources.items() if path.startswith("launch/")}
    around["setup.py"] = (ROOT / "setup.py").read_text(encoding="utf-8")
    texts = [path for folder, suffix in (("docs", "md"), ("configs", "yaml")) for path in (ROOT / folder).rglob(f"*.{suffix}")]
    docs = [path.read_text(encoding="utf-8") for path in texts]
    product = {path: text for path, text in sources.items() if path not in around}
    unused = unused_functions(product, around, docs, set(CALLED_FROM_ELSEWHERE))
    assert not unused, "\n".join(f"{one.path}:{one.node.lineno} {one.name}" for one in unused)


def test_few_places_hold_the_whole_configuration() -> None:
    found = [f"{source.path}:{place}" for source in product_sources() for place in config_holders(source)]
    assert len(found) <= MAX_CONFIG_HOLDERS, "\n".join(found)


def test_top_level_holds_nothing_else() -> None:
    assert not unknown_top_level({path.name for path in ROOT.iterdir()})


def test_files_that_mypy_leaves_out_only_become_fewer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    (left_out,) = [override["module"] for override in settings if override.get("ignore_errors")]
    assert len(left_out) <= 51
    assert all((ROOT / name.replace(".", "/")).with_suffix(".py").is_file() for name in left_out)


def test_readme_maps_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "rlx").glob("*/__init__.py")}
    assert not unmapped_packages(packages, (ROOT / "README.md").read_text(encoding="utf-8"))


BITES: list[tuple[Rule, str, str]] = [
    (layers, "rlx/data/a.py", "from rlx.rewards.base import Verifier"),
    (layers, "rlx/parallel/a.py", "import rlx.models.build"),
    (layers, "rlx/rollout/a.py", "from rlx import parallel"),
    (layers, "rlx/config/a.py", "from rlx.obs.log import logger"),
    (layers, "rlx/algos/a.py", "from ..driver import ppo"),
    (layers, "rlx/trainer/a.py", "from rlx.driver.ppo import x"),
    (layers, "rlx/arch/a.py", "from rlx.config.schema import Config"),
    (layers, "rlx/types/a.py", "from rlx.config import schema"),
    (layers, "rlx/fresh/a.py", "x = 1"),
    (outside, "rlx/models/a.py", "from converters.cli import main"),
    (outside, "rlx/models/a.py", "import tests.helpers"),
    (third_party, "rlx/trainer/a.py", "from megatron.core import tensor_parallel"),
    (third_party, "rlx/sync/a.py", "def f():\n    import sglang"),
    (third_party, "converters/a.py", "import ray"),
    (third_party, "rlx/trainer/a.py", "from torch.utils.tensorboard import SummaryWriter"),
    (third_party, "rlx/trainer/a.py", "from torch.utils import tensorboard"),
    (parallel_state, "rlx/parallel/a.py", "from megatron.core import parallel_state"),
    (parallel_state, "rlx/models/a.py", "from megatron.core.parallel_state import get_tensor_model_parallel_rank"),
    (parallel_state, "rlx/models/a.py", "import megatron.core\nx = megatron.core.parallel_state.f()"),
    (environment, "rlx/trainer/a.py", "import os\nos.environ['A'] = '1'"),
    (environment, "rlx/types/a.py", "import os\nx = os.getenv('A')"),
    (environment, "rlx/cli/a.py", "from os import environ"),
    (torch_free_config, "rlx/config/a.py", "from torch import nn"),
    (torch_free_config, "rlx/config/a.py", "from rlx.types.batch import MicroBatch"),
    (torch_free_config, "rlx/types/layout.py", "import torch"),
    (no_utils, "rlx/utils/a.py", ""),
    (no_utils, "rlx/data/utils.py", ""),
    (late_imports, "rlx/data/a.py", "class A:\n    async def f(self):\n        from json import loads"),
    (late_imports, "rlx/data/a.py", "def f():\n    return importlib.import_module('json').loads"),
    (layers, "rlx/data/a.py", "def f():\n    return import_module('rlx.rewards.base')"),
    (third_party, "rlx/sync/a.py", "x = __import__('sglang')"),
    (budgets, "rlx/data/a.py", "x = 1\n" * 401),
    (budgets, "rlx/data/a.py", "def f():\n" + "    x = 1\n" * 60),
    (budgets, "rlx/data/a.py", "class A:\n    def f(self, a, b, c, /, d, e, *, g, h=1): pass"),
]
PASSES: list[tuple[Rule, str, str]] = [
    (layers, "rlx/models/a.py", "from rlx.parallel.context import x\nfrom rlx.types.batch import y\nfrom rlx.models.b import z"),
    (layers, "rlx/obs/a.py", "from rlx.config.schema import Config"),
    (layers, "rlx/data/a.py", "from rlx import __version__"),
    (third_party, "converters/a.py", "import megatron.core"),
    (third_party, "rlx/parallel/a.py", "from megatron.core import tensor_parallel\nimport rayon"),
    (parallel_state, PARALLEL_STATE_HOME, "from megatron.core import parallel_state"),
    (environment, "rlx/cluster/a.py", "import os\nos.environ['A'] = '1'"),
    (torch_free_config, "rlx/config/a.py", "import yaml\nimport torchlike"),
    (late_imports, "rlx/data/a.py", "import json\ndef f(): return json"),
    (budgets, "rlx/data/a.py", "class A:\n    def f(self, a, b, c, d, e, *, g): pass\n" + "x = 1\n" * 398),
    (budgets, "rlx/data/a.py", "def f():\n" + "    x = 1\n" * 59),
]


@pytest.mark.parametrize(("rule", "path", "text"), BITES)
def test_rule_bites(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), PASSES)
def test_rule_lets_good_code_pass(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


def test_top_level_and_readme_rules_bite() -> None:
    assert unknown_top_level({"rlx", ".ci", "scripts", "README.md"}) == {"scripts"}
    assert unmapped_packages({"data", "sync"}, "rlx/data/  prompts") == {"sync"}


def test_crowded_folders_and_unused_functions_bite() -> None:
    assert crowded_folders([f"rlx/data/{number}.py" for number in range(15)]) == {"rlx/data": 15}
    assert crowded_folders(["rlx/data/__init__.py", *(f"rlx/data/{number}.py" for number in range(14))]) == {}
    assert crowded_folders([f"rlx/cli/{number}.py" for number in range(40)]) == {}
    text = """
class Thing(Base):
    def used(self): return self.spelt
    @property
    def spelt(self): return getattr(self, "by_name")
    def by_name(self): ...
    def idle(self): return self.idle()
    def only_for_idle(self): return self.idle() + helper_of_idle()
class Wanted(Protocol):
    def wanted(self): ...
class Widget(qt.Widget):
    def paint(self): ...
class Base:
    def __len__(self): ...
    @route("/x")
    def handled(self): ...
def helper_of_idle(): ...
def in_docs(): ...
Thing().used()
"""
    unused = unused_functions({"rlx/a.py": text}, {}, ["`path/to/a.py:in_docs`"], set())
    assert [one.name for one in unused] == ["idle", "only_for_idle", "helper_of_idle"]
    assert unused_functions({"rlx/a.py": "class A:\n    def f(self): ..."}, {}, [], {"rlx/a.py:A"}) == []


def test_holders_of_the_configuration_are_found() -> None:
    text = """
@dataclass
class A:
    whole: Config | None
    part: RunConfig
    make: Callable[[Config], int]
    def f(self, config: "Config", *, model: ModelConfig) -> Config:
        self.a, self.b = config, model
        self.c = config.run
"""
    found = ["4: whole: Config | None", "6: make: Callable[[Config], int]", "7: f(config)", "8: self.a, self.b = (config, model)"]
    assert config_holders(Source("rlx/data/a.py", text)) == found
    assert not config_holders(Source("rlx/config/a.py", text))


def test_statements_are_counted_without_docstrings() -> None:
    assert statements('"""A module."""\nx = 1\n\n\ndef f():\n    """A function."""\n    if x:\n        return 2\n') == 4
