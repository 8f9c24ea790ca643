"""The books of one publication: what the engines' model needs, and what has been sent of it so far.

SGLang answers "success" to unknown names, to extra rows and to missing tensors, so the trainer keeps the books itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from rlx.sync.chunks import tensor_info
from rlx.sync.errors import SyncError
from rlx.types.weights import TensorInfo, torch_dtype

WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Ledger:
    """Checks tensors against ``expected`` (Hugging Face name -> shape) and records them. ``dtypes`` are those of tensors that
    must have one certain type, by torch's name."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None = None) -> None:
        self._expected, self._dtypes = expected, dtypes or {}
        self._sent: dict[str, TensorInfo] = {}
        self._num_departed = 0

    @property
    def where(self) -> str:
        """The last tensor that was booked, for error messages."""
        return f"after tensor {next(reversed(self._sent))}" if self._sent else "at the first tensor"

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor of the engines' model."""
        return [math.prod(shape) for shape in self._expected.values()]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Everything recorded, in order."""
        return tuple(self._sent.values())

    def record(self, infos: Iterable[TensorInfo]) -> None:
        """Book tensors that another stage sent. Raises SyncError for a name that is already there."""
        for info in infos:
            if info.name in self._sent:
                raise SyncError(f"tensor {info.name} is sent twice, the second time by another stage")
            self._sent[info.name] = info
            self._num_departed += 1

    def depart(self, num_tensors: int) -> bool:
        """Count booked tensors that now leave in one chunk; True when with them the engines' model is complete."""
        self._num_departed += num_tensors
        return self._num_departed == len(self._expected)

    def checked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass the tensors on, each one checked and booked before it leaves. Raises SyncError naming the tensor."""
        for name, tensor in tensors:
            self._check(name, tensor)
            self._sent[name] = tensor_info(name, tensor)
            yield name, tensor

    def check_complete(self) -> None:
        """Raise SyncError naming tensors of the engines' model that nobody sent."""
        missing = [name for name in self._expected if name not in self._sent]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise SyncError(f"{len(missing)} tensors of the engines' model are missing: {', '.join(missing[:8])}{more}")

    def _check(self, name: str, tensor: Tensor) -> None:
        shape = self._expected.get(name)
        if shape is None:
            raise SyncError(f"tensor {name} is unknown to the engines' model")
        if name in self._sent:
            raise SyncError(f"tensor {name} is sent twice")
        if tuple(tensor.shape) != tuple(shape):
            raise SyncError(f"tensor {name} has shape {list(tensor.shape)}, the engines' model needs {list(shape)}")
        wanted = self._dtypes.get(name)
        if wanted is not None and tensor.dtype != torch_dtype(wanted):
            raise SyncError(f"tensor {name} has dtype {tensor.dtype}, the engines' model needs {wanted}")
        if wanted is None and tensor.dtype not in WIRE_DTYPES:
            raise SyncError(f"tensor {name} has dtype {tensor.dtype}; only float32, bfloat16 and float16 can be sent")
