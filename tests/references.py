"""Which functions of the product nothing in the product refers to, by name.

A name counts as referred to where it is read, looked up as an attribute, spelt in a string (``getattr``, ``module:function``) or
named in docs and configurations as ``file.py:function``. What a function says of itself, and what only other unused ones say,
does not count. Methods that somebody else calls are left out: dunders, those of protocols, those of classes with a base from
elsewhere, and what a decorator hands on.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_PLAIN_DECORATORS = {
    "property", "cached_property", "staticmethod", "classmethod", "abstractmethod", "contextmanager", "asynccontextmanager",
    "lru_cache", "cache", "wraps", "override", "setter", "no_grad", "inference_mode", "total_ordering",
}  # fmt: skip
_PLAIN_BASES = {
    "ABC",
    "Generic",
    "object",
    "NamedTuple",
    "Enum",
    "StrEnum",
    "Exception",
    "ValueError",
    "RuntimeError",
    "TypedDict",
}
_WORD = re.compile(r"[A-Za-z_]\w*(?:[.:][A-Za-z_]\w*)*")
_IN_DOCS = re.compile(r"\.py:(\w+)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Definition:
    """A function or method, and where."""

    path: str
    name: str
    node: Function


def unused_functions(
    product: dict[str, str], around: dict[str, str], docs: Iterable[str], elsewhere: set[str]
) -> list[Definition]:
    """Of the functions in ``product`` (texts by path) those that neither it nor ``around`` refers to. The methods of classes in
    ``elsewhere`` (``path:class``) are called by others."""
    trees = {path: ast.parse(text) for path, text in product.items()}
    own_classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = [one for path, tree in trees.items() for one in _definitions(path, tree, own_classes, elsewhere)]
    mentions = Counter(name for tree in trees.values() for name in _mentions(tree))
    for text in around.values():
        mentions.update(_mentions(ast.parse(text)))
    for text in docs:
        mentions.update(_IN_DOCS.findall(text))
    unused: list[Definition] = []
    while True:
        fresh = [one for one in found if one not in unused and mentions[one.name] <= _said_by_itself(one)]
        if not fresh:
            return sorted(unused, key=lambda one: (one.path, one.node.lineno))
        unused += fresh
        for one in fresh:
            mentions.subtract(_mentions(one.node))
            mentions[one.name] += _said_by_itself(one)


def _said_by_itself(one: Definition) -> int:
    return sum(name == one.name for name in _mentions(one.node))


def _definitions(path: str, tree: ast.Module, classes: dict[str, ast.ClassDef], elsewhere: set[str]) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Function) and not _is_handed_on(node):
            yield Definition(path, node.name, node)
        if isinstance(node, ast.ClassDef) and f"{path}:{node.name}" in elsewhere:
            continue
        if isinstance(node, ast.ClassDef) and not _is_called_from_elsewhere(node, classes):
            for inner in node.body:
                is_dunder = isinstance(inner, Function) and inner.name.startswith("__") and inner.name.endswith("__")
                if isinstance(inner, Function) and not is_dunder and not _is_handed_on(inner):
                    yield Definition(path, inner.name, inner)


def _is_handed_on(node: Function) -> bool:
    return any(_last_name(decorator) not in _PLAIN_DECORATORS for decorator in node.decorator_list)


def _is_called_from_elsewhere(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> bool:
    for base in map(_last_name, node.bases):
        if base in _PLAIN_BASES:
            continue
        # A class that is called like its base has that from another package.
        if base not in classes or classes[base] is node or _is_called_from_elsewhere(classes[base], classes):
            return True
    return False


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call | ast.Subscript):
        return _last_name(node.func if isinstance(node, ast.Call) else node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _mentions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _WORD.fullmatch(node.value):
            yield from re.split("[.:]", node.value)
