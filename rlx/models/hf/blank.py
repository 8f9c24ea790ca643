"""A Hugging Face folder's weights, all of them zeros: right names, shapes and types for a server that is given its weights later.

The files have holes where the zeros are, so they take no room and no time on a disk. Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlx.models.hf.files import DTYPE_NAMES, INDEX, itemsize

_FILE_BYTES = 4 * 2**30
_ALIGNED = 8  # the header ends at a multiple, as safetensors writes it
_NAMES = {torch_name: name for name, torch_name in DTYPE_NAMES.items()}


@dataclass(slots=True)
class _File:
    header: dict[str, object] = field(default_factory=dict)
    num_bytes: int = 0


def write_blank(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], dtype: str) -> None:
    """Write the safetensors files and their index. Types by torch's names: what ``dtypes`` says, or ``dtype``."""
    files: dict[str, str] = {}
    for number, part in enumerate(_files(shapes, dtypes, dtype)):
        name = f"model-{number:05d}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}, **part.header}).encode()
        text += b" " * (-len(text) % _ALIGNED)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + part.num_bytes)
        files |= dict.fromkeys(part.header, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(files.items()))}, indent=1))


def _files(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], dtype: str) -> Iterator[_File]:
    part = _File()
    # Wide types first: readers look at numbers where they lie.
    for name in sorted(shapes, key=lambda name: -itemsize(dtypes.get(name, dtype))):
        kind, size = dtypes.get(name, dtype), 1
        for extent in (*shapes[name], itemsize(kind)):
            size *= extent
        if part.header and part.num_bytes + size > _FILE_BYTES:
            yield part
            part = _File()
        offsets = [part.num_bytes, part.num_bytes + size]
        part.header[name] = {"dtype": _NAMES[kind], "shape": list(shapes[name]), "data_offsets": offsets}
        part.num_bytes += size
    if part.header:
        yield part
