"""Host memory of this process that others on the machine open by a path.

The memory belongs to the process that made it: a file without a name, kept by its open descriptor. No helper process has to
live and no shared-memory file system has to be large enough, and whatever ends the process leaves nothing behind.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import weakref

import torch
from torch import Tensor

# What ``torch.from_file`` counts in: float32.
WORD_BYTES = 4
_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
# By the address of the memory, the descriptor that keeps it.
_descriptors: dict[int, int] = {}


def shared_copy(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` (uint8 [n], on any device) in host memory that has a path for as long as the copy lives."""
    num_bytes = tensor.numel()
    descriptor = os.memfd_create("rlx-shared", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, math.ceil(max(1, num_bytes) / WORD_BYTES) * WORD_BYTES)
        mapping = mmap.mmap(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    shared = torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes) if num_bytes else torch.empty(0, dtype=torch.uint8)
    _descriptors[shared.data_ptr()] = descriptor
    # The tensor holds the mapping; a process that ends has its descriptors closed anyway.
    weakref.finalize(mapping, _close, shared.data_ptr()).atexit = False
    return shared.copy_(tensor)


def path_of(tensor: Tensor) -> str:
    """Where another process opens the memory of a tensor of ``shared_copy``. ValueError for any other tensor."""
    descriptor = _descriptors.get(tensor.data_ptr())
    if descriptor is None:
        raise ValueError("the tensor is not in memory that other processes can open: take shared_copy of it")
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def open_words(path: object, shared: object, num_words: object) -> Tensor:
    """``torch.from_file`` for the paths of ``path_of`` only, and without writing to what is there. ValueError otherwise."""
    if not isinstance(path, str) or not _PATH.fullmatch(path) or shared is not False or type(num_words) is not int:
        raise ValueError(f"{path!r} is no memory that a process shares")
    return torch.from_file(path, False, num_words)


def _close(address: int) -> None:
    os.close(_descriptors.pop(address))
