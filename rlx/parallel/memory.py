"""Where a trainer rank's memory goes, and moving it to host memory and back between the phases of co-located runs.

Whole storages move, so that every tensor on them (Megatron's buffers, their shards, the parameters) stays the object it
was: a storage is copied to host memory and shrunk to nothing, and later grown again and filled. Megatron 0.19's own
``offload_to_cpu`` replaces tensors instead, which in fp32 cuts the optimizer's shards off from the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlx.parallel.optimizer import Trainable

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer")
# What each setting of cluster.offload puts away.
LEVELS: Mapping[str, tuple[str, ...]] = {"none": (), "optimizer": ("optimizer", "gradients"), "all": PARTS}


class TrainerMemory:
    """The memory of one rank's models by part. ``trained`` have all three, ``frozen`` modules only weights.

    ``away`` says which parts are put away between updates. Not thread-safe; gradients are not kept, for every update
    begins by zeroing them.
    """

    def __init__(self, trained: Sequence[Trainable], frozen: Sequence[nn.Module], away: Sequence[str] = ()) -> None:
        self._trained, self._frozen, self.away = tuple(trained), tuple(frozen), tuple(away)
        self._shelves = {part: _Shelf(keeps=part != "gradients") for part in PARTS}

    def put_away(self, parts: Sequence[str] = PARTS) -> None:
        """Move those of ``parts`` that are to be put away to host memory, and give the device's free memory back."""
        for part in parts:
            if part in self.away:
                self._shelves[part].put_away(self._tensors(part))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def bring_back(self, parts: Sequence[str] = PARTS) -> None:
        """Undo ``put_away``; nothing for parts that are where they belong."""
        for part in parts:
            self._shelves[part].bring_back()

    def sizes(self) -> dict[str, int]:
        """Bytes of each part when it is on its device, the moments that the optimizer's first step makes included."""
        found = {part: sum(map(_size, self._shelves[part].all_of(self._tensors(part)))) for part in PARTS}
        found["optimizer"] += sum(trainable.moments_to_come() for trainable in self._trained)
        return found

    def _tensors(self, part: str) -> Iterator[Tensor]:
        """Tensors whose storages are the part; several may lie on one."""
        parameters = [parameter for module in self._modules() for parameter in module.parameters()]
        if part == "weights":
            yield from parameters
        elif part == "gradients":
            for trainable in self._trained:
                yield from trainable.gradient_buffers()
        else:
            # In fp32 the optimizer steps on the parameters themselves, by views of their buffers.
            device = parameters[0].device
            weights = {_key(tensor) for tensor in parameters}
            for trainable in self._trained:
                for tensor in trainable.optimizer_tensors():
                    if tensor.device == device and _key(tensor) not in weights:
                        yield tensor

    def _modules(self) -> Iterator[nn.Module]:
        for trainable in self._trained:
            yield from trainable.chunks
        yield from self._frozen


class _Shelf:
    """Storages and, while they are away, their contents. Host buffers are kept for the next time."""

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        self._buffers: dict[int, Tensor] = {}

    def put_away(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of ``tensors`` out and free them."""
        if self._away:
            return
        buffers: dict[int, Tensor] = {}
        for storage in _storages(tensors):
            size, kept = storage.nbytes(), None
            if self._keeps:
                key = storage._cdata
                kept = self._buffers.get(key)
                if kept is None or kept.numel() != size:
                    kept = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                kept.copy_(_bytes(storage), non_blocking=True)
                buffers[key] = kept
            self._away.append((storage, size, kept))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._buffers = buffers
        for storage, _, _ in self._away:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Grow the storages again and fill them: with what they held, or with zeros."""
        for storage, size, kept in self._away:
            storage.resize_(size)
            if kept is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(kept, non_blocking=True)
        if self._away and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._away = []

    def all_of(self, tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
        """Storages with their full sizes, wherever they are."""
        if self._away:
            return [(storage, size) for storage, size, _ in self._away]
        return [(storage, storage.nbytes()) for storage in _storages(tensors)]


def _size(entry: tuple[torch.UntypedStorage, int]) -> int:
    return entry[1]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage._cdata, storage)
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def usage(device: torch.device) -> dict[str, float]:
    """Memory now, in GiB: of this process on its GPU, of everybody on that GPU, and of this process on the host.

    The peak is the one since the last call.
    """
    found = {"memory/host_rss_gib": _status_kib("/proc/self/status", "VmRSS") / 2**20}
    host = _status_kib("/proc/meminfo", "MemTotal") - _status_kib("/proc/meminfo", "MemAvailable")
    found["memory/host_used_gib"] = host / 2**20
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "memory/gpu_allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "memory/gpu_reserved_gib": torch.cuda.memory_reserved(device) / GIB,
            "memory/gpu_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/gpu_used_gib": (total - free) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
    return found


def device_used(device: torch.device) -> int:
    """Bytes in use on a GPU by all processes together; 0 on CPUs."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def describe(sizes: Mapping[str, int]) -> str:
    """ "weights 1.25, gradients 2.50, ... GiB"."""
    return ", ".join(f"{part} {size / GIB:.3f}" for part, size in sizes.items()) + " GiB"


def _status_kib(path: str, name: str) -> int:
    """A line such as ``VmRSS:   123 kB`` of a file of /proc; 0 when there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
