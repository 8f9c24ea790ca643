"""The safetensors files of a Hugging Face folder: which tensor lies where. Knows no torch, which takes a second to import.

Reads are plain ones at known offsets, not memory maps: the bytes read are exactly the bytes asked for, and they never stay
resident.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# What safetensors calls a type: torch's name of it.
DTYPE_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_ITEM_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1, "bool": 1}
_LENGTH_BYTES = 8  # a little-endian length, then a JSON header of that length, then the tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: ``start`` counts bytes from the beginning of ``file``; ``dtype`` is torch's name of the type."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@cache
def itemsize(dtype: str) -> int:
    """Bytes of an element of the type that torch calls so."""
    return next(size for ending, size in _ITEM_BYTES.items() if dtype.partition("_")[0].endswith(ending))


class HfFiles:
    """One checkpoint, one file or sharded. ValueError names the missing or broken file or tensor. Safe to share by threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._headers: dict[str, Mapping[str, StoredTensor]] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Tensor name to file name."""
        index = self.path / INDEX
        if index.is_file():
            files = _weight_map(index)
            if (self.path / SINGLE).is_file():
                if set(files.values()) == {SINGLE}:
                    return dict.fromkeys(self._header(SINGLE), SINGLE)
                raise ValueError(
                    f"{self.path} holds {SINGLE} and {INDEX}, which names other files: transformers loads {SINGLE}, others what"
                    " the index names; remove the one that is out of date"
                )
            for name in sorted(set(files.values())):
                if not os.path.isfile(self.path / name):
                    raise ValueError(f"{index} names {name}, which is not there")
            return files
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._header(SINGLE), SINGLE)
        raise ValueError(f"{self.path} holds neither {INDEX} nor {SINGLE}")

    def tensor(self, name: str) -> StoredTensor:
        """Where and what a tensor is."""
        if name not in self.files:
            raise ValueError(f"{self.path} has no tensor {name}")
        file = self.files[name]
        header = self._header(file)
        if name not in header:
            raise ValueError(f"{self.path / file} has no tensor {name}, which {INDEX} says it has")
        return header[name]

    @property
    def dtype(self) -> str:
        """The type that most of the weights have, by torch's name; what is stored in 8 bits is computed with in another one."""
        stored = [self.tensor(name) for name in self.files]
        wide = [tensor for tensor in stored if not tensor.dtype.startswith("float8")]
        return prevailing((tensor.dtype, math.prod(tensor.shape)) for tensor in wide or stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensor(name).shape

    def read_rows(self, name: str, start: int, stop: int) -> bytearray:
        """The bytes of rows [start:stop)."""
        stored = self.tensor(name)
        row_bytes = stored.num_bytes // max(1, stored.shape[0])
        rows = bytearray((stop - start) * row_bytes)
        self.fill(stored, memoryview(rows), stored.start + start * row_bytes)
        return rows

    def locate(self, name: str) -> tuple[int, int, int]:
        """Where a whole tensor lies: an open descriptor of its file, the first byte, the number of bytes. What is read
        through it is the caller's to count."""
        stored = self.tensor(name)
        return self._descriptor(stored.file), stored.start, stored.num_bytes

    def close(self) -> None:
        """Give the files back; reading opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def fill(self, stored: StoredTensor, buffer: memoryview, position: int) -> None:
        """Read the buffer full from this byte of the tensor's file on."""
        descriptor, done = self._descriptor(stored.file), 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], position + done)
            if count == 0:
                raise ValueError(f"{self.path / stored.file} ended at byte {position + done} while it was read")
            done += count

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]

    def _header(self, file: str) -> Mapping[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = read_header(self.path / file)
        return self._headers[file]


def prevailing(sizes: Iterable[tuple[str, int]]) -> str:
    """Of (type, size) the type that most is of; the first one of several."""
    totals: Counter[str] = Counter()
    for dtype, size in sizes:
        totals[dtype] += size
    return totals.most_common(1)[0][0]


def refuse_untied(source: HfFiles) -> None:
    """ValueError where a folder whose configuration ties the output matrix to the embedding holds another one: readers differ
    in which of the two they take."""
    if HEAD in source.files and not same_tensor(source, HEAD, source, EMBEDDING):
        raise ValueError(f"{source.path}: {HEAD} differs from {EMBEDDING}, though config.json ties them (tie_word_embeddings)")


def same_tensor(a: HfFiles, name_a: str, b: HfFiles, name_b: str) -> bool:
    """Whether two stored tensors are the same bits, compared block by block."""
    stored = a.tensor(name_a)
    if (stored.shape, stored.dtype) != (b.tensor(name_b).shape, b.tensor(name_b).dtype):
        return False
    blocks = row_blocks(stored.shape, stored.num_bytes)
    return all(a.read_rows(name_a, start, stop) == b.read_rows(name_b, start, stop) for start, stop in blocks)


def row_blocks(shape: tuple[int, ...], num_bytes: int, limit: int = 32 * 2**20) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most about ``limit`` bytes."""
    step = max(1, shape[0] * limit // max(num_bytes, 1))
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text())
        return {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of tensors: expected an object with a weight_map ({error!r})") from error


def read_header(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of one safetensors file. ValueError when the file is cut short or is not what it says."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ValueError(f"{path} cannot be read: it is cut short or no safetensors file (its header does not fit)")
        text = stream.read(length)
    begin = _LENGTH_BYTES + length
    try:
        tensors = dict(_entries(json.loads(text), path.name, begin))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: its header is broken ({error})") from error
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=begin)
    if end != size:
        last = max(tensors, key=lambda name: tensors[name].start, default="")
        raise ValueError(f"{path} cannot be read: it has {size} bytes, its header says {end} (last tensor {last})")
    return tensors


def _entries(header: Mapping[str, Any], file: str, begin: int) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPE_NAMES:
            raise ValueError(f"{name} has dtype {entry['dtype']}; known: {', '.join(DTYPE_NAMES)}")
        start, stop = entry["data_offsets"]
        shape = tuple(int(extent) for extent in entry["shape"])
        stored = StoredTensor(file=file, start=begin + start, shape=shape, dtype=DTYPE_NAMES[entry["dtype"]])
        if stop - start != stored.num_bytes:
            raise ValueError(f"{name} has {stop - start} bytes, its shape and dtype need {stored.num_bytes}")
        yield name, stored
