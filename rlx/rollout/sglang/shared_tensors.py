"""Tensors handed to another process of this machine as a text: the memory stays where it is, the text says where.

GPU memory goes as a CUDA IPC handle, host memory as a named shared-memory segment of this process's own, both in the form of
``torch.multiprocessing``'s reductions. The text is what SGLang's ``/update_weights_from_tensor`` takes with ``load_format``
"flattened_bucket": the base64 of a pickle of ``{"flattened_tensor": uint8 tensor, "metadata": [...]}``. It stands for one
reader: the memory counts its readers, and one that opened the same text twice would count itself out twice.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from rlx.rollout.sglang.segments import own_segments
from rlx.types.weights import TensorInfo

LOAD_FORMAT = "flattened_bucket"
# The load format of requests to ``rlx.rollout.sglang.receiver``, by the name under which engines import it.
RECEIVER_MODULE = "rlx_receiver"
RECEIVER = f"{RECEIVER_MODULE}.load"
RECEIVER_TRANSPORTS = ("stream", "ipc")
# Where ``reduce_tensor`` puts the GPU's number among the arguments; the number means another GPU in another process.
_DEVICE = 6
_DTYPES = ("uint8", "float64", "float32", "bfloat16", "float16", "float8_e4m3fn")


def share_bucket(buffer: Tensor, infos: Sequence[TensorInfo]) -> str:
    """A text by which one other process of this machine opens ``buffer``: uint8 [sum of the infos' bytes], laid end to end.

    The buffer must stay as it is until that process has read it. Host memory is copied into shared memory, unless it is there
    (``in_shared_memory``).
    """
    metadata, start = [], 0
    for info in infos:
        end = start + info.num_bytes
        # SGLang reads attributes of a class of its own; it lets this one pass, which needs no SGLang here.
        metadata.append(
            types.SimpleNamespace(
                name=info.name,
                shape=info.shape,
                dtype=getattr(torch, info.dtype),
                start_idx=start,
                end_idx=end,
                numel=info.num_bytes,
            )
        )
        start = end
    if buffer.dtype != torch.uint8 or buffer.shape != (start,):
        raise ValueError(f"the buffer is {buffer.dtype} {list(buffer.shape)}, its tensors need {start} bytes")
    written = io.BytesIO()
    _Pickler(written).dump({"flattened_tensor": in_shared_memory(buffer), "metadata": metadata})
    return base64.b64encode(written.getvalue()).decode("ascii")


def in_shared_memory(buffer: Tensor) -> Tensor:
    """``buffer`` as texts can name it: itself on a GPU, or a copy in a segment that lasts until its readers have let go of it."""
    is_there = buffer.is_cuda or not buffer.numel() or own_segments().holds(buffer)
    return buffer if is_there else own_segments().holding(buffer)


def open_bucket(text: str) -> tuple[Tensor, tuple[TensorInfo, ...]]:
    """The buffer behind a text of ``share_bucket`` (or of SGLang's own serializer) and what lies in it.

    Nothing but tensors can come out of the text. ValueError says what is wrong with it, or that the memory is gone.
    """
    found = _opened(text)
    if not isinstance(found, dict) or not isinstance(found.get("flattened_tensor"), Tensor):
        raise ValueError("the shared tensors are no flattened bucket")
    try:
        infos = tuple(
            TensorInfo(
                name=str(entry.name), shape=tuple(int(n) for n in entry.shape), dtype=str(entry.dtype).removeprefix("torch.")
            )
            for entry in found["metadata"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the shared bucket does not say what lies in it: {error}") from error
    return found["flattened_tensor"], infos


def receiver_text(request: Mapping[str, object], memory: Tensor | None = None) -> str:
    """A request to ``rlx.rollout.sglang.receiver`` as a text of the same kind: its JSON is the name of a tensor, ``memory``
    (uint8 [n], in shared memory where it is the host's) or an empty one."""
    written = io.BytesIO()
    _Pickler(written).dump([(json.dumps(request), torch.empty(0, dtype=torch.uint8) if memory is None else memory)])
    return base64.b64encode(written.getvalue()).decode("ascii")


def open_request(text: str) -> list[tuple[str, Tensor]]:
    """What ``receiver_text`` packed. ValueError when the text is of another kind."""
    found = _opened(text)
    if not isinstance(found, list) or [tuple(map(type, pair)) for pair in found] != [(str, Tensor)]:
        raise ValueError("the shared tensors are no request to the receiver")
    return found


def _opened(text: str) -> object:
    try:
        return _Unpickler(io.BytesIO(base64.b64decode(text, validate=True))).load()
    except (binascii.Error, pickle.UnpicklingError, EOFError, RuntimeError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"the shared tensors cannot be opened: {type(error).__name__}: {error}") from error


class _Pickler(ForkingPickler):
    """Tensors become handles: host memory by name (a descriptor could not leave the process tree), GPUs by their UUID."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.UntypedStorage) and obj.device.type == "cpu" and obj.nbytes():
            manager, handle, size = obj._share_filename_cpu_()
            obj._shared_incref()
            return reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size)
        if isinstance(obj, Tensor) and obj.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(obj)
            uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
            return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
        return NotImplemented


def _rebuild_cuda_tensor(*arguments: Any) -> Any:
    """``rebuild_cuda_tensor`` with the GPU's UUID translated into this process's number for it."""
    device = arguments[_DEVICE]
    if isinstance(device, str):
        visible = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
        if device not in visible:
            raise ValueError(f"the shared tensors are on GPU {device}; this process sees {', '.join(visible) or 'none'}")
        device = visible.index(device)
    rebuild: Callable[..., Any] = reductions.rebuild_cuda_tensor
    return rebuild(*arguments[:_DEVICE], device, *arguments[_DEVICE + 1 :])


def _allowed() -> dict[tuple[str, str], Any]:
    rebuilders: dict[str, Callable[..., Any]] = {
        "rebuild_tensor": reductions.rebuild_tensor,
        "rebuild_typed_storage": reductions.rebuild_typed_storage,
        "rebuild_storage_filename": reductions.rebuild_storage_filename,
        "rebuild_storage_empty": reductions.rebuild_storage_empty,
        "rebuild_cuda_tensor": _rebuild_cuda_tensor,
    }
    found: dict[tuple[str, str], Any] = {("torch.multiprocessing.reductions", name): call for name, call in rebuilders.items()}
    for module in ("torch", "torch.storage"):
        found |= {(module, "UntypedStorage"): torch.UntypedStorage, (module, "TypedStorage"): torch.storage.TypedStorage}
    found |= {("torch", name): getattr(torch, name) for name in _DTYPES}
    plain = {("types", "SimpleNamespace"): types.SimpleNamespace, ("torch", "Size"): torch.Size, ("torch", "Tensor"): Tensor}
    # SGLang's own serializer names its class; any object with those attributes does here.
    own = {("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"): types.SimpleNamespace}
    return found | plain | own


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a bucket needs; a pickle may name any function of any module otherwise."""

    _names = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a bucket of tensors")
        return self._names[module, name]
