"""Adam's memory of one model as tensors named by parameter: the same in a checkpoint whatever the layout and whoever holds it.

Megatron describes an optimizer as it is held (sharded or whole, dense and expert parts in a chain, groups keyed by their learning
rates) and takes back only what is held in the same way. Where a stage shares its embedding with another it even writes sharded
moments under other parameters' names (0.19.2: the padding between buckets is missing in the gathered buffer, not in the offsets).
A checkpoint of ours holds each parameter's moments and, where it is not fp32 itself, its fp32 master. Learning rates, betas and
the like come from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from rlx.parallel.offload import is_offloaded, make_states, state_of, take_weights

_MASTER, _MOMENTS = "param", ("exp_avg", "exp_avg_sq")
_GATHERED_AT_ONCE = 2**26  # elements of each rank that are on the device at a time


def sharded_moments(parts: Sequence[Any], model: Mapping[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """What a checkpoint holds of Megatron's optimizers ``parts`` (of dense parameters, of experts) beside the sharded ``model``:
    tensors of the parameters' shapes. Collective."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    named = {id(entry.data): entry for entry in nested_values(sharded)}
    found = {}
    for index, part in enumerate(map(_holder, _real(parts))):
        for name in (_MASTER, *_MOMENTS):
            for number, parameter, tensor in part.empty(name) if is_loading else part.whole(name):
                entry = make_sharded_optimizer_tensor(named[id(parameter)], tensor, prefix=f"optimizer.state.{name}")
                found[f"{index}.{number}.{name}"] = entry
    return found


@torch.no_grad()
def load_moments(parts: Sequence[Any], saved: Mapping[str, Tensor], num_updates: int) -> None:
    """Take back what ``sharded_moments`` described, as read from a checkpoint made after ``num_updates`` steps of Adam."""
    for index, part in enumerate(map(_holder, _real(parts))):
        for number, parameter in enumerate(part.parameters()):
            for name, tensor in part.held(parameter).items():
                tensor.copy_(part.piece(parameter, saved[f"{index}.{number}.{name}"]))
        if isinstance(part, _Offloaded):
            take_weights(part.optimizer, num_updates)
        else:
            _set_updates(part.optimizer, num_updates)


def _real(parts: Sequence[Any]) -> list[Any]:
    return [part for part in parts if not part.is_stub_optimizer]


def _holder(part: Any) -> _Whole | _Sharded:
    """One of Megatron's optimizers, its moments made (as the first step would make them) where there are none yet."""
    if is_offloaded(part.optimizer):
        make_states(part.optimizer)
        return _Offloaded(part)
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
    return _Sharded(part) if isinstance(part, DistributedOptimizer) else _Whole(part)


def _set_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for state in optimizer.state.values():
            # A tensor of its own each: Adam advances a shared one once a parameter.
            state["step"] = torch.tensor(float(num_updates))
    else:  # Transformer Engine's and Apex's count once a group
        for group in optimizer.param_groups:
            group["step"] = num_updates


class _Whole:
    """An optimizer whose every rank holds whole parameters."""

    def __init__(self, part: Any) -> None:
        self.optimizer: torch.optim.Optimizer = part.optimizer
        pairs = zip(getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True)
        model_of = {id(master): parameter for group in pairs for parameter, master in zip(*group, strict=True)}
        masters = [master for group in self.optimizer.param_groups for master in group["params"]]
        self._master_of: dict[Tensor, Tensor] = {model_of.get(id(master), master): master for master in masters}

    def parameters(self) -> list[Tensor]:
        """The model's parameters in a fixed order."""
        return list(self._master_of)

    def held(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is held here of a parameter: its moments, and a master of one that is not fp32; nothing of another rank's."""
        master = self._master(parameter)
        if master is None:
            return {}
        found = {name: self.optimizer.state[master][name] for name in _MOMENTS}
        return found if parameter.dtype == torch.float32 else {_MASTER: master.detach(), **found}

    def piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The part of ``whole``, a tensor like the parameter, that is held here."""
        return whole

    def whole(self, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, parameter, whole tensor) of every parameter that has a ``name``. Collective."""
        for number, parameter in enumerate(self.parameters()):
            if name in (held := self.held(parameter)):
                yield number, parameter, held[name]

    def empty(self, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As ``whole``, with room to read into instead."""
        for number, parameter in enumerate(self.parameters()):
            if name != _MASTER or parameter.dtype != torch.float32:
                yield number, parameter, torch.empty(parameter.shape, dtype=torch.float32, device="cpu")

    def _master(self, parameter: Tensor) -> Tensor | None:
        return self._master_of[parameter]


class _Sharded(_Whole):
    """Megatron's distributed optimizer: a rank holds flat pieces of some parameters, cut out of padded buffers."""

    def __init__(self, part: DistributedOptimizer) -> None:
        self.optimizer = part.optimizer
        self._part = part

    def parameters(self) -> list[Tensor]:
        return [parameter for buffer in self._part.buffers for parameter in buffer.param_index_map]

    def piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        kept = self._part._get_model_param_range_map(parameter)["param"]
        return whole.flatten()[kept.start : kept.end]

    def whole(self, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        first = 0
        for buffer, ranges in zip(self._part.buffers, self._part.gbuf_ranges, strict=True):
            if name == _MASTER and buffer.param_dtype == torch.float32:
                continue
            (by_bucket,) = ranges.values()
            content = torch.cat(
                [self._gathered(name, bucket, where) for bucket, where in zip(buffer.buckets, by_bucket, strict=True)]
            )
            for number, (parameter, (start, end, _)) in enumerate(buffer.param_index_map.items(), start=first):
                yield number, parameter, content[start:end].view(parameter.shape)
            first += len(buffer.param_index_map)

    def _gathered(self, name: str, bucket: Any, where: Mapping[str, Any]) -> Tensor:
        """A bucket with its padding, in host memory: every rank holds an equal stretch of it."""
        group = self._part.data_parallel_group
        stretch = torch.zeros(bucket.grad_data.numel() // group.size(), device=bucket.grad_data.device)
        for parameter, ranges in where["param_map"].items():
            local = ranges["gbuf_local"]
            stretch[local.start : local.end] = self.held(parameter)[name]
        whole = torch.empty(group.size(), stretch.numel(), device="cpu")
        for start in range(0, stretch.numel(), _GATHERED_AT_ONCE):
            piece = stretch[start : start + _GATHERED_AT_ONCE]
            pieces = [torch.empty_like(piece) for _ in range(group.size())]
            dist.all_gather(pieces, piece, group=group)
            for row, found in zip(whole, pieces, strict=True):
                row[start : start + _GATHERED_AT_ONCE] = found
        return whole.flatten()

    def _master(self, parameter: Tensor) -> Tensor | None:
        if parameter not in self._part.model_param_group_index_map:
            return None
        group, number = self._part.model_param_group_index_map[parameter]
        master: Tensor = self.optimizer.param_groups[group]["params"][number]
        return master


class _Offloaded(_Sharded):
    """The same with masters and moments in host memory."""

    def held(self, parameter: Tensor) -> dict[str, Tensor]:
        piece = self._master(parameter)
        if piece is None:
            return {}
        master, found = state_of(self.optimizer, piece)
        return found if parameter.dtype == torch.float32 else {_MASTER: master.detach(), **found}
