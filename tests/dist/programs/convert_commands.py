"""Runs converter commands one after another in one process, with faults where a command asks for one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from converters import export, extents, to_hf
from converters.__main__ import main as convert
from converters.items import ItemFile, Write
from converters.plan import Position
from tests.dist.programs import layouts

_GATHER_BYTES = 2**40  # nothing is that long: all is gathered in memory


def out_of_space(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


@contextlib.contextmanager
def disk_full_after(count: int) -> Iterator[None]:
    """Room for ``count`` items."""
    written, add = [0], ItemFile.add

    def limited(*arguments: Any, **options: Any) -> None:
        written[0] += 1
        (out_of_space if written[0] > count else add)(*arguments, **options)

    with mock.patch.object(ItemFile, "add", limited):
        yield


@contextlib.contextmanager
def wrong_weight(key_part: str) -> Iterator[None]:
    """Changes the last bit of one element of the layer 1 block of a tensor as it is written."""
    add = ItemFile.add

    def change(file: ItemFile, block: tuple[str, Position, Position], dtype: str, write: Write, **options: Any) -> None:
        key, offset, _ = block

        def wrong(descriptor: int, position: int) -> int:
            size = write(descriptor, position)
            (byte,) = os.pread(descriptor, 1, position + 20)
            os.pwrite(descriptor, bytes([byte ^ 1]), position + 20)
            return size

        add(file, block, dtype, wrong if key_part in key and offset[0] == 1 else write, **options)

    with mock.patch.object(ItemFile, "add", change):
        yield


@contextlib.contextmanager
def hf_disk_full(_: Any) -> Iterator[None]:
    with mock.patch.object(export, "put", out_of_space), mock.patch.object(to_hf, "write_all", out_of_space):
        yield


FAULTS: dict[str | None, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    None: contextlib.nullcontext,
    "disk full": disk_full_after,
    "wrong weight": wrong_weight,
    "disk full on the way back": hf_disk_full,
}


@contextlib.contextmanager
def copies(gather: bool) -> Iterator[list[int]]:
    """The bytes copied in the kernel: of tensors of any size, as of large ones, or of none."""
    copied, real = [0], extents.copy

    def copy(*arguments: Any) -> int:
        count = real(*arguments)
        copied[0] += count
        return count

    least = mock.patch.object(extents, "MIN_EXTENT_BYTES", _GATHER_BYTES if gather else 1)
    with least, mock.patch.object(extents, "copy", copy):
        yield copied


def one(command: dict[str, Any]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    written = copies(command.get("gather", False))
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with streams[0], streams[1], written as copied, FAULTS[command.get("fault")](command.get("value")):
        try:
            code = convert(command["argv"])
        except SystemExit as ended:
            code = int(ended.code or 0)
    words = command["argv"]
    folder = Path(words[len(words) - words[::-1].index("--out")])  # the last one counts
    files = {file.name: file.stat().st_mtime_ns for file in (folder.glob("*") if folder.is_dir() else ())}
    texts = {"out": out.getvalue(), "err": err.getvalue()}
    return {"code": code, **texts, "exists": folder.is_dir(), "files": files, "copied": copied[0]}


def program(arguments: dict[str, Any]) -> None:
    found = {name: one(command) for name, command in arguments["commands"].items()}
    Path(arguments["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    program(layouts.arguments())
