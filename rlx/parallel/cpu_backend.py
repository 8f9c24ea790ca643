"""Runs stock Megatron-Core on CPUs over gloo by answering the CUDA calls it makes.

Nothing in the installed packages changes: ``install()`` gives this process CPU answers to ``torch.cuda`` and to the few
places where Megatron assumes NCCL. It knows nothing of models or training. Each answer says what needs it.

Whoever chose the CPU installs it (``rlx.processes.device``), visible GPUs or none, and before anything imports Megatron, which
looks at its import for packages that work on GPUs only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _device

_CPU = torch.device("cpu")
# Megatron takes these where they are installed, whatever device it works on: the optimizers of the first two refuse tensors on
# a CPU, and the last one's library needs a GPU's driver to be loaded.
_GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_mla")
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "tril",
    "triu",
    "zeros",
    "zeros_like",
]


class _Stream:
    """Stands where a CUDA stream or event is expected: work on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    def wait_event(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Stream:
        return self

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


_installed: list[bool] = []


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int | torch.dtype) and torch.device(device).type == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def install() -> None:
    """Give this process the CPU answers; a second call does nothing. RuntimeError when Megatron was imported before."""
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU backend must be installed before Megatron is imported")
    _installed.append(True)
    # It says that there is no GPU where there is CUDA: so it is meant to be.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for name in _GPU_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say that there is no such package
    _answer_cuda()
    _redirect_tensors()
    _answer_megatron()


def _current_device() -> torch.device:
    return _CPU


def _answer_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _current_device
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    # Megatron's optimizers and grad-norm code build their scratch tensors from these legacy types.
    cuda.FloatTensor, cuda.IntTensor, cuda.LongTensor = torch.FloatTensor, torch.IntTensor, torch.LongTensor
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None


def _redirect_tensors() -> None:
    # torch.device("meta") as a context knows the factories by identity and looks them up once; transformers builds models in it.
    _device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    move = tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_CPU if isinstance(a, str | torch.device) and _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return move(self, *args, **kwargs)

    tensor.to = to


@contextlib.contextmanager
def gpu_type_names() -> Iterator[None]:
    """Inside, with the backend installed, a tensor's type has its name on a GPU ('torch.cuda.FloatTensor', ...): Megatron's
    optimizers accept parameters and gradients by these names."""
    tensor: Any = torch.Tensor
    type_of = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        return answer if args or kwargs else answer.replace("torch.", "torch.cuda.", 1)

    if _installed:
        tensor.type = type_
    try:
        yield
    finally:
        tensor.type = type_of


def _answer_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The dispatcher moves split sizes to the host only from a GPU, and needs them as numbers.
        return tensor.cpu().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host
    dist.all_gather = _uneven_all_gather(dist.all_gather)
    dist.reduce_scatter = _uneven_reduce_scatter(dist.reduce_scatter)


def _uneven_all_gather(gather: Callable[..., Any]) -> Callable[..., Any]:
    """gloo gathers equal shapes only; the expert dispatcher with expert-TP gathers unequal first dimensions."""

    @functools.wraps(gather)
    def all_gather(outputs: Sequence[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({tuple(output.shape) for output in outputs}) == 1:
            return gather(outputs, tensor, group=group, async_op=async_op)
        longest = max(output.shape[0] for output in outputs)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        received = [torch.empty_like(padded) for _ in outputs]
        gather(received, padded, group=group)
        for output, piece in zip(outputs, received, strict=True):
            output.copy_(piece[: output.shape[0]])
        return None

    return all_gather


def _uneven_reduce_scatter(scatter: Callable[..., Any]) -> Callable[..., Any]:
    """The same for reduce-scatter: reduce everything, keep the own piece."""

    @functools.wraps(scatter)
    def reduce_scatter(
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({tuple(piece.shape) for piece in inputs}) == 1:
            return scatter(output, list(inputs), op=op, group=group, async_op=async_op)
        everything = torch.cat(list(inputs))
        dist.all_reduce(everything, op=op, group=group)
        output.copy_(everything.split([piece.shape[0] for piece in inputs])[dist.get_rank(group)])
        return None

    return reduce_scatter
