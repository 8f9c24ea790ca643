"""Runs converter commands one after another in one process, with faults where a command asks for one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from converters import to_hf
from converters.__main__ import main as convert
from converters.storage import ItemFile
from tests.dist.programs import layouts

Add = Callable[..., None]


def disk_full_after(count: int, add: Add) -> Add:
    written = [0]

    def fail(file: ItemFile, *arguments: Any) -> None:
        written[0] += 1
        if written[0] > count:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        add(file, *arguments)

    return fail


def wrong_weight(key_part: str, add: Add) -> Add:
    """Changes the last bit of one element of the layer 1 block of a tensor as it is written."""

    def change(file: ItemFile, key: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        if key_part in key and offset[0] == 1:
            tensor = tensor.clone()
            tensor.view(-1)[5:6].view(torch.int32).bitwise_xor_(1)
        add(file, key, offset, tensor)

    return change


@contextlib.contextmanager
def fault(kind: str | None, value: Any) -> Iterator[None]:
    if kind is None:
        yield
        return
    add = ItemFile.add
    ItemFile.add = {"disk full": disk_full_after, "wrong weight": wrong_weight}[kind](value, add)  # type: ignore[method-assign, operator]
    try:
        yield
    finally:
        ItemFile.add = add  # type: ignore[method-assign]


@contextlib.contextmanager
def hf_disk_full(active: bool) -> Iterator[None]:
    write = to_hf._write_all

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    to_hf._write_all = fail if active else write
    try:
        yield
    finally:
        to_hf._write_all = write


def one(command: dict[str, Any]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    faults = (fault(command.get("fault"), command.get("value")), hf_disk_full(command.get("hf_disk_full", False)))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), faults[0], faults[1]:
        try:
            code = convert(command["argv"])
        except SystemExit as ended:
            code = int(ended.code or 0)
    words = command["argv"]
    folder = Path(words[len(words) - words[::-1].index("--out")])  # the last one counts
    files = {file.name: file.stat().st_mtime_ns for file in (folder.glob("*") if folder.is_dir() else ())}
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "exists": folder.is_dir(), "files": files}


def program(arguments: dict[str, Any]) -> None:
    found = {name: one(command) for name, command in arguments["commands"].items()}
    Path(arguments["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    program(layouts.arguments())
