"""What the receiver remembers of a loader: copies where it only copies, the loader itself everywhere else."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlx.rollout.sglang import receiver
from rlx.rollout.sglang.receiver import Bucket, Entry

HIDDEN = 6


class Model(nn.Module):
    """A fused projection and a norm, filled by ``rule`` from tensors by name."""

    def __init__(self, rule: Callable[[Model, str, Tensor], None]) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(5, HIDDEN))
        self.norm = nn.Parameter(torch.zeros(HIDDEN))
        self.register_buffer("scale", torch.ones(1))
        self.derived = torch.zeros(HIDDEN)
        self._rule = rule
        self.calls = 0

    def load_weights(self, weights) -> None:
        self.calls += 1
        for name, tensor in weights:
            self._rule(self, name, tensor)


def stack(model: Model, name: str, tensor: Tensor) -> None:
    first, count = {"up": (0, 3), "down": (3, 2)}.get(name, (0, 0))
    target = model.norm.data if name == "norm" else model.fused.data.narrow(0, first, count)
    target.copy_(tensor)


def columns(model: Model, name: str, tensor: Tensor) -> None:
    """A rank's half of a matrix that is split by columns."""
    if name == "norm":
        model.norm.data.copy_(tensor)
    else:
        model.fused.data[:2, :3].copy_(tensor[:2].narrow(1, 3, 3))


def transpose(model: Model, name: str, tensor: Tensor) -> None:
    if name == "up":
        model.fused.data[:, :3].t()[:, :5].copy_(tensor[:, :5])


def cast(model: Model, name: str, tensor: Tensor) -> None:
    (model.norm if name == "norm" else model.fused[: len(tensor)]).data.copy_(tensor.double())


def derive(model: Model, name: str, tensor: Tensor) -> None:
    stack(model, name, tensor)
    if name == "norm":
        model.derived = model.norm.data * 2


def add_one(model: Model, name: str, tensor: Tensor) -> None:
    stack(model, name, tensor)
    if name == "norm":
        model.norm.data.add_(1)


def pad(model: Model, name: str, tensor: Tensor) -> None:
    """As vocabularies are padded: rows of zeros after the copied ones, none of them in the last call."""
    if name != "norm":
        model.fused.data[: len(tensor)].copy_(tensor)
        model.fused.data[len(tensor) + 2 :].fill_(0)
        model.scale.zero_()


def erase(model: Model, name: str, tensor: Tensor) -> None:
    stack(model, name, tensor)
    if name == "down":
        model.fused.data[1:4].fill_(0)


def fill_from(model: Model, name: str, tensor: Tensor) -> None:
    stack(model, name, tensor)
    model.scale.fill_(tensor.flatten()[0])


def bucket(tensors: dict[str, Tensor]) -> tuple[Bucket, Tensor]:
    entries, start = [], 0
    for name, tensor in tensors.items():
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), start))
        start += tensor.numel() * tensor.element_size()
    return Bucket(tuple(entries)), torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])


def draw(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"up": (3, HIDDEN), "down": (2, HIDDEN), "norm": (HIDDEN,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("rule", "num_copies"),
    [
        (stack, 2),
        (columns, 3),
        (transpose, 1),
        (pad, 2),
        (cast, None),
        (derive, None),
        (add_one, None),
        (erase, None),
        (fill_from, None),
    ],
)
def test_a_second_bucket_lands_as_the_loader_puts_it(rule, num_copies) -> None:
    model, like = Model(rule), Model(rule)
    known, first = bucket(draw())
    known.load(model, first)
    assert (None if known.copies is None else len(known.copies)) == num_copies
    for attempt in range(2):
        tensors = draw()
        known.fill(model, bucket(tensors)[1], receiver._addresses(model))
        like.load_weights(iter(tensors.items()))
        for got, want in zip(
            [*model.state_dict().values(), model.derived], [*like.state_dict().values(), like.derived], strict=True
        ):
            assert torch.equal(got, want)
        assert model.calls == (1 if num_copies else attempt + 2)


def test_another_type_on_the_wire_is_converted_as_it_is_copied() -> None:
    model = Model(stack)
    known, first = bucket(draw(torch.bfloat16))
    known.load(model, first)
    assert known.copies is not None and len(known.copies) == 3, "no stretch of bytes is the same in both types"
    tensors = draw(torch.bfloat16)
    known.fill(model, bucket(tensors)[1], receiver._addresses(model))
    assert torch.equal(model.fused.data, torch.cat([tensors["up"], tensors["down"]]).float())


def test_parameters_that_moved_are_found_again() -> None:
    model = Model(stack)
    known, first = bucket(draw())
    known.load(model, first)
    model.fused.data = model.fused.data.clone()
    tensors = draw()
    known.fill(model, bucket(tensors)[1], receiver._addresses(model))
    assert model.calls == 2 and torch.equal(model.fused.data[:3], tensors["up"])


def test_a_type_at_an_odd_place_goes_through_the_loader() -> None:
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor) if name == "norm" else None)
    tensors = {"tiny": torch.ones(3, dtype=torch.uint8), "norm": torch.randn(HIDDEN)}
    known, first = bucket(tensors)
    known.load(model, first)
    assert known.copies is None
    tensors["norm"] = torch.randn(HIDDEN)
    known.fill(model, bucket(tensors)[1], receiver._addresses(model))
    assert torch.equal(model.norm.data, tensors["norm"])


def test_an_empty_tensor_and_many_stretches_join() -> None:
    """Expert by expert, as mixtures of experts load: rows that follow each other become one copy."""
    target = nn.Parameter(torch.zeros(4, 3, 2))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = target

        def load_weights(self, weights) -> None:
            for name, tensor in weights:
                if tensor.numel():
                    self.target.data[int(name)].copy_(tensor)

    tensors = {str(number): torch.randn(3, 2) for number in range(4)} | {"9": torch.zeros(0)}
    known, first = bucket(tensors)
    model = Experts()
    known.load(model, first)
    assert known.copies is not None and [copy.num_bytes for copy in known.copies] == [4 * math.prod((4, 3, 2))]
    assert torch.equal(target.data, torch.stack([tensors[str(number)] for number in range(4)]))


def test_the_file_stands_alone() -> None:
    """Servers import it from an environment without rlx."""
    source = Path(receiver.__file__).read_text()
    modules = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert modules <= {*sys.stdlib_module_names, "torch"}


@pytest.mark.parametrize("module", ["mm_schedule", "mm_utils"])
def test_what_a_tower_made_of_images_is_forgotten_wherever_sglang_keeps_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    kept = {"image": "features"}
    name = f"sglang.srt.managers.{module}"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(embedding_cache=kept))  # type: ignore[arg-type]
    receiver.forget_images()
    assert not kept
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(embedding_cache=None))  # type: ignore[arg-type]
    receiver.forget_images()


@pytest.mark.parametrize(("tensor", "forgets"), [("visual.merger.mlp.0.weight", True), ("model.norm.weight", False)])
def test_images_are_forgotten_where_a_tower_comes(monkeypatch: pytest.MonkeyPatch, tensor: str, forgets: bool) -> None:
    calls: list[int] = []
    monkeypatch.setattr(receiver, "forget_images", lambda: calls.append(1))
    monkeypatch.setattr(receiver, "_received", lambda group, buckets, device: [torch.zeros(24, dtype=torch.uint8)] * len(buckets))
    monkeypatch.setattr(receiver, "_device", lambda model, group: torch.device("cpu"))
    monkeypatch.setattr(receiver, "_buckets", {})
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor))
    for request in ({"bucket": [[tensor, "float32", [HIDDEN]]], "number": 0}, {"stream": 1}):
        assert receiver._take(model, None, "group", request) == ""  # type: ignore[arg-type]
    assert len(calls) == (2 if forgets else 0)


def test_a_bucket_with_the_number_of_one_that_is_known_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends the books: a publication of other tensors begins them anew."""
    monkeypatch.setattr(receiver, "_received", lambda group, buckets, device: [torch.ones(24, dtype=torch.uint8)] * len(buckets))
    monkeypatch.setattr(receiver, "_device", lambda model, group: torch.device("cpu"))
    monkeypatch.setattr(receiver, "_buckets", {})
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor))

    def take(request: dict[str, object]) -> str:
        return receiver._take(model, None, "group", request)  # type: ignore[arg-type]

    for names in (("a", "b", "c"), ("d", "e")):
        for number, name in enumerate(names):
            assert take({"bucket": [[name, "float32", [HIDDEN]]], "number": number}) == ""
        assert [bucket.entries[0].name for bucket in receiver._buckets["group"]] == list(names)
    assert take({"stream": 2}) == "" and take({"stream": 3}).startswith("3 buckets were announced, 2 are known")
