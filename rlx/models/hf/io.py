"""Hugging Face weights in and out of Megatron chunks, by the family's table. Loading reads only this rank's slices."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import weight_table
from rlx.arch.sizes import expected_shapes
from rlx.arch.weights import Row, Shard
from rlx.models.hf.companions import Companions
from rlx.models.hf.files import INDEX, SINGLE, HfFiles, refuse_untied
from rlx.models.hf.folder import HfFolder
from rlx.models.hf.row_tensors import export, load
from rlx.parallel.context import ParallelContext

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_BLOCK = re.compile(r"^vision\.blocks\.(\d+)\.")
# One module an expert, or (Transformer Engine) one module for all with numbered weights.
_EXPERT = re.compile(
    r"(?<=mlp\.experts\.)(?:local_experts\.(?P<module>\d+)\.(?P<a>\w+)\.weight|(?P<b>\w+)\.weight(?P<weight>\d+))$"
)
# Transformer Engine keeps the norm's weight inside the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slot:
    """One parameter of this rank and the row that fills it. ``layer`` (of a tower: the block) and ``expert`` are numbers in the
    whole model; ``expert`` is None outside experts."""

    parameter: nn.Parameter
    row: Row
    layer: int
    expert: int | None
    is_tied_copy: bool = False
    hf_names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hf_names", self.names_of(self.expert))

    def names_of(self, expert: int | None) -> tuple[str, ...]:
        """The row's Hugging Face names, for this layer and the expert of this number."""
        return tuple(name.format(layer=self.layer, expert=expert) for name in self.row.hf_names)


def slots(chunks: Sequence[nn.Module], arch: Architecture, context: ParallelContext) -> Iterator[Slot]:
    """Every parameter of this rank's chunks with its row, in model order; the value head, which no table knows, is left out.

    A tied output matrix on the last stage of a pipeline is a copy of the embedding: filled from it, never exported.
    """
    for chunk in chunks:
        if chunk not in _SLOTS:
            _SLOTS[chunk] = tuple(_slots_of(chunk, arch, context))
        yield from _SLOTS[chunk]


# A model is published every few seconds, and may have tens of thousands of parameters.
_SLOTS: WeakKeyDictionary[nn.Module, tuple[Slot, ...]] = WeakKeyDictionary()


def constant_names(chunks: Sequence[nn.Module], arch: Architecture, context: ParallelContext) -> frozenset[str]:
    """Hugging Face names of this rank's tensors of a vision tower that do not learn. Other parameters without a gradient (a
    router's bias) may be moved by rules of their own."""
    towers = (chunk.vision for chunk in chunks if isinstance(getattr(chunk, "vision", None), nn.Module))
    kept = {id(parameter) for tower in towers for parameter in tower.parameters() if not parameter.requires_grad}  # type: ignore[union-attr]
    return frozenset(name for slot in slots(chunks, arch, context) if id(slot.parameter) in kept for name in slot.hf_names)


def _slots_of(chunk: nn.Module, arch: Architecture, context: ParallelContext) -> Iterator[Slot]:
    table = weight_table(arch)
    for name, parameter in chunk.named_parameters():
        generic, layer, expert = _generic_name(chunk, name)
        if expert is not None:
            assert arch.experts is not None
            expert += context.groups.ep.rank() * arch.experts.num_experts // context.dims.ep
        if generic.startswith("output_layer.") and parameter.shape[0] == 1:
            continue
        if generic == "output_layer.bias":
            continue
        is_tied_copy = generic == "output_layer.weight" and arch.tied_embeddings
        row = table["embedding.word_embeddings.weight" if is_tied_copy else generic]
        yield Slot(parameter=parameter, row=row, layer=layer, expert=expert, is_tied_copy=is_tied_copy)


def _generic_name(chunk: nn.Module, name: str) -> tuple[str, int, int | None]:
    """Name with ``{layer}`` and ``{expert}`` for the numbers, the layer's (or block's) number in the whole model, and the
    expert's on this rank."""
    block = _BLOCK.search(name)
    if block:
        return _BLOCK.sub("vision.blocks.{layer}.", name), int(block[1]), None
    found = _LAYER.search(name)
    layer = -1
    if found:
        layer = int(chunk.get_submodule(f"decoder.layers.{found[1]}").layer_number) - 1  # type: ignore[arg-type]
        name = _LAYER.sub("decoder.layers.{layer}.", name)
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    expert = _EXPERT.search(name)
    if expert is None:
        return name, layer, None
    number = int(expert["module"] or expert["weight"] or 0)
    return f"{name[: expert.start()]}{{expert}}.{expert['a'] or expert['b']}.weight", layer, number


def load_hf(chunks: Sequence[nn.Module], arch: Architecture, folder: str | Path, context: ParallelContext) -> None:
    """Fill the chunks from a Hugging Face folder. ValueError on missing or misshapen tensors, before any is written.
    Collective."""
    source = HfFolder(folder)
    problem = None
    if arch.tied_embeddings and context.rank == 0:
        try:
            refuse_untied(source)
        except ValueError as error:
            problem = error
    context.raise_together(problem)
    shards = {
        False: Shard(rank=context.tp_rank, size=context.dims.tp),
        True: Shard(rank=context.groups.expt_tp.rank(), size=context.dims.expert_tp),
    }
    wanted = list(slots(chunks, arch, context))
    for slot in wanted:
        for name, shape in zip(slot.hf_names, slot.row.hf_shapes(arch), strict=True):
            if source.shape(name) != shape:
                raise ValueError(f"{source.path}: {name} has shape {source.shape(name)}, config.json implies {shape}")
    with torch.no_grad():
        for slot in wanted:
            slot.parameter.copy_(load(slot.row, source.read, slot.hf_names, shards[slot.expert is not None], arch))


Room = Callable[[int], Tensor | None]


def no_room(num_bytes: int) -> None:
    """No memory but one's own."""


def _value(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def stage_weights(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    context: ParallelContext,
    read: Callable[[nn.Parameter], Tensor] = _value,
    *,
    everywhere: bool = False,
    room: Room = no_room,
) -> Iterator[tuple[str, Tensor]]:
    """The full Hugging Face tensors of this pipeline stage, on its sender and nothing on the others; or on all its ranks
    (``everywhere``), in the same order.

    Collective over the stage: every rank must drive the iterator to its end. A split parameter is gathered whole, one at
    a time, and experts of other ranks come one by one, so at most one parameter exists in full (beside what
    the consumer keeps). ``read`` gives what to export of a parameter, shaped like it: its value, or its gradient. ``room`` is
    asked for memory to gather one whole tensor in (``everywhere``).
    """
    gathers = everywhere or (context.dp_rank == 0 and context.cp_rank == 0)
    gathers_experts = everywhere or context.groups.expt_dp.rank() == 0
    for slot in slots(chunks, arch, context):
        if slot.is_tied_copy:
            continue
        if slot.expert is None and gathers:
            whole = _gather(slot, read(slot.parameter), context.groups.tp, arch, room if everywhere else None)
            if everywhere or context.is_sender:
                yield from zip(slot.hf_names, whole, strict=True)
        elif slot.expert is not None and gathers_experts:
            whole = _gather(slot, read(slot.parameter), context.groups.expt_tp, arch, no_room if everywhere else None)
            if everywhere:
                yield from _all_experts(slot, whole, context.groups.ep, arch)
            elif context.groups.expt_tp.rank() == 0:
                yield from _collect_experts(slot, whole, context.groups.ep, arch)


def _gather(slot: Slot, weight: Tensor, group: dist.ProcessGroup, arch: Architecture, room: Room | None) -> tuple[Tensor, ...]:
    """A parameter's Hugging Face tensors on the group's first rank (with ``room`` on all); nothing on the others."""
    pieces = [weight]
    if slot.row.is_split and group.size() > 1:
        pieces = _from_all(weight, group, no_room if room is None or len(slot.hf_names) > 1 else room)
    return export(slot.row, pieces, arch) if room is not None or group.rank() == 0 else ()


def _from_all(tensor: Tensor, group: dist.ProcessGroup, room: Room) -> list[Tensor]:
    """Every rank's tensor, all of one shape, one behind the other in memory."""
    found = room(group.size() * tensor.nbytes)
    whole = tensor.new_empty(group.size() * tensor.numel()) if found is None else found.view(tensor.dtype)
    dist.all_gather_into_tensor(whole, tensor.contiguous().view(-1), group=group)
    return list(whole.view(group.size(), *tensor.shape))


def _all_experts(
    slot: Slot, tensors: Sequence[Tensor], group: dist.ProcessGroup, arch: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """The experts that stand in the same place on all ranks, in the order of the ranks."""
    assert slot.expert is not None and arch.experts is not None
    gathered = [_from_all(tensor, group, no_room) if group.size() > 1 else [tensor] for tensor in tensors]
    each = arch.experts.num_experts // group.size()
    for rank in range(group.size()):
        names = slot.names_of(slot.expert + (rank - group.rank()) * each)
        for name, found in zip(names, gathered, strict=True):
            yield name, found[rank]


def _collect_experts(
    slot: Slot, tensors: Sequence[Tensor], group: dist.ProcessGroup, arch: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """On the group's first rank: this rank's expert, then the experts in the same place on the other ranks."""
    if group.rank():
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=group, group_dst=0)
        return
    yield from zip(slot.hf_names, tensors, strict=True)
    assert slot.expert is not None and arch.experts is not None
    for rank in range(1, group.size()):
        names = slot.names_of(slot.expert + rank * arch.experts.num_experts // group.size())
        for name, like in zip(names, tensors, strict=True):
            received = torch.empty_like(like, memory_format=torch.contiguous_format)
            dist.recv(received, group=group, group_src=rank)
            yield name, received


def export_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    *,
    companions: Companions,
    target: str | Path,
    context: ParallelContext,
) -> None:
    """Write the model as a Hugging Face folder: each pipeline stage its own files, then the index and the ``companions``.
    Collective over all ranks; the folder appears whole or not at all."""
    weights = stage_weights(chunks, arch, context)
    write_hf(weights, expected_shapes(arch).keys(), companions=companions, target=target, context=context)


def write_hf(
    weights: Iterator[tuple[str, Tensor]],
    names: Set[str],
    *,
    companions: Companions,
    target: str | Path,
    context: ParallelContext,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """As ``export_hf``, of any tensors: what this rank's stage writes, and the names of all stages together. ``finish`` is
    called on rank 0 with the folder when everything else is in it, before it gets its name."""
    target = Path(target)
    beside = target.with_name(target.name + ".partial")
    if context.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    context.barrier()
    written = _write_stage(weights, beside, context)
    merged = {name: file for part in context.gather_objects(written) for name, file in part.items()}
    if context.rank == 0:
        _finish_export(merged, names, beside)
        companions.write(beside, HfFiles(beside).dtype)
        finish(beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
    context.barrier()


def _write_stage(weights: Iterator[tuple[str, Tensor]], folder: Path, context: ParallelContext) -> dict[str, str]:
    written: dict[str, str] = {}
    batch: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"model-{context.pp_rank:03d}-{len(set(written.values())):05d}.safetensors"
        save_file(batch, folder / file, metadata={"format": "pt"})
        written.update(dict.fromkeys(batch, file))
        batch.clear()

    for name, tensor in weights:
        batch[name] = tensor.contiguous().cpu().clone()
        if sum(t.numel() * t.element_size() for t in batch.values()) > SHARD_BYTES:
            flush()
    if batch:
        flush()
    return written


def _finish_export(written: Mapping[str, str], names: Set[str], folder: Path) -> None:
    missing = names - written.keys()
    assert not missing, f"export lacks {sorted(missing)}"
    if len(set(written.values())) == 1:
        (folder / next(iter(written.values()))).rename(folder / SINGLE)
    else:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(written.items()))}, indent=1))
