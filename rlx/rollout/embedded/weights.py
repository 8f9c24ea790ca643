"""New weights for the model: checked whole, received whole, and only then copied in, so that a failure changes nothing.

Names are those on disk in Hugging Face folders, which for dense models of text are the names of ``state_dict()``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from rlx.rollout.embedded.fields import Fields
from rlx.rollout.embedded.model import LanguageModel
from rlx.rollout.sglang import receiver
from rlx.rollout.sglang.shared_tensors import (
    LOAD_FORMAT,
    RECEIVER,
    open_bucket,
    open_request,
)
from rlx.rollout.sglang.weight_group import (
    WeightGroupError,
    broadcast_from_trainer,
    join_weight_group,
    leave_weight_group,
)
from rlx.types.weights import TensorInfo

_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """A checked announcement: these tensors come over this group, one broadcast each or all in one byte buffer."""

    group: dist.ProcessGroup
    infos: tuple[TensorInfo, ...]
    flattened: bool


class WeightStore:
    """The model's tensors by name, and the groups over which new ones come."""

    def __init__(self, model: LanguageModel, timeout_s: float) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._groups: dict[str, dist.ProcessGroup | None] = {}  # None while a join is under way
        self._lock = threading.Lock()

    # -- groups ----------------------------------------------------------------------------------------------------

    def join_group(self, fields: Fields) -> None:
        """Join the group that the request describes; blocks for the peers. ValueError or WeightGroupError say why not."""
        name = fields.text("group_name", "weight_update_group")
        with self._lock:
            if name in self._groups:
                raise ValueError(f"{name!r}: The specified group name has already been created")
            self._groups[name] = None
        try:
            group = join_weight_group(
                master_address=fields.text("master_address"),
                master_port=fields.integer("master_port"),
                rank=fields.integer("rank_offset"),
                world_size=fields.integer("world_size"),
                group_name=name,
                backend=fields.text("backend", "nccl"),
                timeout_s=self._timeout_s,
            )
        except BaseException:
            with self._lock:
                del self._groups[name]
            raise
        with self._lock:
            self._groups[name] = group

    def leave_group(self, name: str) -> None:
        """Destroy a group; ValueError when there is none of that name (or it is still waiting for its peers)."""
        with self._lock:
            if self._groups.get(name) is None:
                raise ValueError(f"{name!r}: The group to be destroyed does not exist")
            group = self._groups.pop(name)
        assert group is not None
        leave_weight_group(group)

    # -- updates over a group --------------------------------------------------------------------------------------

    def plan(self, fields: Fields) -> UpdatePlan:
        """Check an announcement against the model. ValueError names the first tensor that does not fit."""
        names, dtypes, shapes = fields.list_of("names"), fields.list_of("dtypes"), fields.list_of("shapes")
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes; wanted one of each a tensor")
        load_format = fields.optional("load_format")
        if load_format not in (None, "flattened_bucket"):
            raise ValueError(f"load_format is {load_format!r}; wanted null or 'flattened_bucket'")
        infos = tuple(_info(name, dtype, shape) for name, dtype, shape in zip(names, dtypes, shapes, strict=True))
        self._check({info.name: info.shape for info in infos}, len(infos))
        name = fields.text("group_name", "weight_update_group")
        group = self._groups.get(name)
        if group is None:
            raise ValueError(f"group_name {name!r} is not a group this engine has joined; it has {sorted(self._groups)}")
        return UpdatePlan(group=group, infos=infos, flattened=load_format is not None)

    def receive(self, plan: UpdatePlan) -> None:
        """Take part in the broadcasts of ``plan`` and copy the tensors in. RuntimeError when the trainer goes away."""
        # NCCL moves device memory only; over gloo host memory is the straight way.
        device = self._model.device if dist.get_backend(plan.group) == "nccl" else torch.device("cpu")
        if plan.flattened:
            buffer = torch.empty(sum(info.num_bytes for info in plan.infos), dtype=torch.uint8, device=device)
            buffers = [buffer]
        else:
            buffers = [torch.empty(info.shape, dtype=_DTYPES[info.dtype], device=device) for info in plan.infos]
        works = [broadcast_from_trainer(buffer, plan.group) for buffer in buffers]
        failure: RuntimeError | None = None
        for work in works:  # every one is waited for: a buffer must outlive its broadcast
            try:
                work.wait()
            except RuntimeError as error:
                failure = failure or error
        if failure is not None:
            raise WeightGroupError(f"the broadcast from the trainer failed; no tensor was changed ({failure})") from failure
        tensors = _unflatten(buffers[0], plan.infos) if plan.flattened else buffers
        self._copy_in({info.name: tensor for info, tensor in zip(plan.infos, tensors, strict=True)})

    # -- shared memory -----------------------------------------------------------------------------------------------

    def load_shared(self, fields: Fields) -> None:
        """Copy in the tensors of a shared bucket, or let the receiver take them off a group. ValueError when a text cannot be
        opened or does not fit the model."""
        texts, load_format = fields.list_of("serialized_named_tensors"), fields.optional("load_format")
        if load_format not in (LOAD_FORMAT, RECEIVER):
            raise ValueError(f"load_format is {load_format!r}; the embedded engine takes {LOAD_FORMAT!r} and {RECEIVER!r}")
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError(f"serialized_named_tensors has {len(texts)} entries; wanted one text, for the only rank")
        if load_format == RECEIVER:
            receiver.load(self, open_request(texts[0]))
            return
        buffer, infos = open_bucket(texts[0])
        for info in infos:
            _info(info.name, info.dtype, list(info.shape))
        self._check({info.name: info.shape for info in infos}, len(infos))
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() != sum(info.num_bytes for info in infos):
            raise ValueError(f"the bucket holds {buffer.numel()} {buffer.dtype}, not the bytes of its {len(infos)} tensors")
        tensors = _unflatten(buffer, infos)
        self._copy_in({info.name: tensor for info, tensor in zip(infos, tensors, strict=True)})
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # the trainer may write there again once it has our answer

    # What the receiver asks of a model.

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self._targets().items()

    def named_buffers(self) -> Iterable[tuple[str, Tensor]]:
        return ()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        tensors = dict(weights)
        self._check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, len(tensors))
        self._copy_in(tensors)

    # -- from disk, and back -----------------------------------------------------------------------------------------

    def load_folder(self, folder: Path) -> None:
        """Copy in every tensor of a folder's safetensors files. ValueError for tensors that are unknown, unfit or missing."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"model_path {str(folder)!r}: no such folder, or no *.safetensors in it")
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= load_file(file)
        self._check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, len(tensors))
        targets = self._targets()
        given = {targets[name].data_ptr() for name in tensors}
        missing = sorted(name for name, target in targets.items() if target.data_ptr() not in given)
        if missing:
            raise ValueError(f"model_path {str(folder)!r} lacks {len(missing)} tensors, the first is {missing[0]!r}")
        self._copy_in(tensors)

    def rows(self, name: str, count: int) -> list[object]:
        """The first ``count`` rows of a tensor as nested lists of float32. ValueError for an unknown name."""
        targets = self._targets()
        if name not in targets:
            raise ValueError(f"Get parameter by name failed: the model has no tensor {name!r}")
        values: list[object] = targets[name][:count].float().cpu().tolist()
        return values

    def _targets(self) -> Mapping[str, Tensor]:
        targets: Mapping[str, Tensor] = self._model.module.state_dict()
        return {disk_name(name): tensor for name, tensor in targets.items()} if self._model.info.vision is not None else targets

    def _check(self, shapes: Mapping[str, tuple[int, ...]], count: int) -> None:
        if len(shapes) != count:
            raise ValueError("a tensor is named twice in one update")
        targets = self._targets()
        for name, shape in shapes.items():
            if name not in targets:
                raise ValueError(f"the model has no tensor {name!r}; wanted Hugging Face names like {next(iter(targets))!r}")
            if shape != tuple(targets[name].shape):
                raise ValueError(f"{name!r} has shape {list(shape)}; the model's is {list(targets[name].shape)}")

    @torch.no_grad()
    def _copy_in(self, tensors: Mapping[str, Tensor]) -> None:
        targets = self._targets()
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def disk_name(name: str) -> str:
    """What the tensor of a model with a tower is called in its folder; transformers wraps both parts once more."""
    for prefix, short in _PREFIXES.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def _info(name: object, dtype: object, shape: object) -> TensorInfo:
    if not isinstance(name, str):
        raise ValueError(f"a tensor's name is {name!r}; wanted a text")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name!r} has dtype {dtype!r}; wanted one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise ValueError(f"{name!r} has shape {shape!r}; wanted a list of sizes")
    return TensorInfo(name=name, shape=tuple(shape), dtype=dtype)


def _unflatten(buffer: Tensor, infos: tuple[TensorInfo, ...]) -> list[Tensor]:
    """Cut a byte buffer into the tensors that were laid end to end in it."""
    tensors, start = [], 0
    for info in infos:
        # Cloned, because a slice that starts at an odd byte cannot be read as a wider type in place.
        piece = buffer[start : start + info.num_bytes].clone()
        tensors.append(piece.view(_DTYPES[info.dtype]).view(info.shape))
        start += info.num_bytes
    return tensors
