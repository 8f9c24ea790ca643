"""What the receiver remembers of a loader: copies where it only copies, the loader itself everywhere else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlx.rollout.sglang import receiver
from rlx.rollout.sglang.receiver import buckets, group
from rlx.rollout.sglang.receiver.buckets import Bucket, Entry, addresses_of
from rlx.rollout.sglang.receiver.flags import Flags, is_alive, wait_until

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
        known.fill(model, bucket(tensors)[1], addresses_of(model))
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
    known.fill(model, bucket(tensors)[1], addresses_of(model))
    assert torch.equal(model.fused.data, torch.cat([tensors["up"], tensors["down"]]).float())


def test_parameters_that_moved_are_found_again() -> None:
    model = Model(stack)
    known, first = bucket(draw())
    known.load(model, first)
    model.fused.data = model.fused.data.clone()
    tensors = draw()
    known.fill(model, bucket(tensors)[1], addresses_of(model))
    assert model.calls == 2 and torch.equal(model.fused.data[:3], tensors["up"])


def test_a_type_at_an_odd_place_goes_through_the_loader() -> None:
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor) if name == "norm" else None)
    tensors = {"tiny": torch.ones(3, dtype=torch.uint8), "norm": torch.randn(HIDDEN)}
    known, first = bucket(tensors)
    known.load(model, first)
    assert known.copies is None
    tensors["norm"] = torch.randn(HIDDEN)
    known.fill(model, bucket(tensors)[1], addresses_of(model))
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
    """Servers import the package from an environment without rlx, under another name."""
    for file in Path(receiver.__file__).parent.glob("*.py"):
        lines = file.read_text().splitlines()
        modules = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
        assert modules <= {*sys.stdlib_module_names, "torch", ""}, file


@pytest.mark.parametrize("module", ["mm_schedule", "mm_utils"])
def test_what_a_tower_made_of_images_is_forgotten_wherever_sglang_keeps_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    kept = {"image": "features"}
    name = f"sglang.srt.managers.{module}"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(embedding_cache=kept))  # type: ignore[arg-type]
    of_tower = Bucket((Entry("visual.merger.mlp.0.weight", torch.float32, (1,), 0),))
    buckets.forget_images([Bucket((Entry("model.norm.weight", torch.float32, (1,), 0),))])
    assert kept
    buckets.forget_images([of_tower])
    assert not kept
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(embedding_cache=None))  # type: ignore[arg-type]
    buckets.forget_images([of_tower])


@pytest.mark.parametrize(("tensor", "forgets"), [("visual.merger.mlp.0.weight", True), ("model.norm.weight", False)])
def test_images_are_forgotten_where_a_tower_comes(monkeypatch: pytest.MonkeyPatch, tensor: str, forgets: bool) -> None:
    calls: list[int] = []
    cache = types.SimpleNamespace(clear=lambda: calls.append(1))
    where = "sglang.srt.managers.mm_schedule"
    monkeypatch.setitem(sys.modules, where, types.SimpleNamespace(embedding_cache=cache))  # type: ignore[arg-type]
    monkeypatch.setattr(group, "_received", lambda group, buckets, device: [torch.zeros(24, dtype=torch.uint8)] * len(buckets))
    monkeypatch.setattr(group, "_device", lambda model, group: torch.device("cpu"))
    monkeypatch.setattr(group, "_buckets", {})
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor))
    for request in ({"bucket": [[tensor, "float32", [HIDDEN]]], "number": 0}, {"stream": 1}):
        assert group._take(model, None, "group", request) == ""  # type: ignore[arg-type]
    assert len(calls) == (2 if forgets else 0)


def test_a_bucket_with_the_number_of_one_that_is_known_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends the books: a publication of other tensors begins them anew."""
    monkeypatch.setattr(group, "_received", lambda group, buckets, device: [torch.ones(24, dtype=torch.uint8)] * len(buckets))
    monkeypatch.setattr(group, "_device", lambda model, group: torch.device("cpu"))
    monkeypatch.setattr(group, "_buckets", {})
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor))

    def take(request: dict[str, object]) -> str:
        return group._take(model, None, "group", request)  # type: ignore[arg-type]

    for names in (("a", "b", "c"), ("d", "e")):
        for number, name in enumerate(names):
            assert take({"bucket": [[name, "float32", [HIDDEN]]], "number": number}) == ""
        assert [bucket.entries[0].name for bucket in group._buckets["group"]] == list(names)
    assert take({"stream": 2}) == "" and take({"stream": 3}).startswith("3 buckets were announced, 2 are known")


# Memory that a trainer shares.


def filled(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> tuple[Flags, torch.Tensor]:
    """Flags beside an area with one bucket, at an odd place."""
    written = Flags.create(str(tmp_path / "flags"), 2)
    known, bytes_ = bucket(tensors)
    entries = known.entries
    area = torch.cat([torch.zeros(7 * 16, dtype=torch.uint8), bytes_])
    rows = [[entry.name, str(entry.dtype).removeprefix("torch."), entry.shape, entry.start] for entry in entries]
    (tmp_path / "flags.book").write_text(json.dumps([7 * 16, rows]) + "\n")
    written.fill(1)
    return written, area


def request_of(written: Flags, known: int = 0, limit_s: float = 5.0) -> str:
    return json.dumps({"flags": written.path, "reader": 1, "book": "b", "known": known, "limit_s": limit_s})


def test_buckets_come_out_of_shared_memory_and_are_remembered(tmp_path: Path) -> None:
    model = Model(lambda model, name, tensor: model.norm.data.copy_(tensor))
    first = {"norm": torch.randn(HIDDEN)}
    written, area = filled(tmp_path, first)
    written.complete()
    receiver.load(model, [(request_of(written), area)])
    assert torch.equal(model.norm.data, first["norm"])
    assert (written.taken(1), written.is_done(1), written.problem(1)) == (1, True, "") and written.reader(1) == os.getpid()
    assert (written.taken(0), written.is_done(0)) == (0, False), "the other reader's page is its own"
    written.remove()
    assert not list(tmp_path.iterdir())
    second = {"norm": torch.randn(HIDDEN)}
    written, area = filled(tmp_path, second)
    (tmp_path / "flags.book").unlink()
    written.complete()
    receiver.load(model, [(request_of(written, known=1), area)])
    assert torch.equal(model.norm.data, second["norm"]) and written.problem(1) == ""


def test_what_goes_wrong_is_said_in_the_flags(tmp_path: Path) -> None:
    def refuse(model: Model, name: str, tensor: torch.Tensor) -> None:
        raise ValueError(f"{name} does not fit")

    written, area = filled(tmp_path, {"norm": torch.randn(HIDDEN)})
    written.complete()
    receiver.load(Model(refuse), [(request_of(written), area)])
    assert written.is_done(1) and written.problem(1) == "ValueError: norm does not fit (in norm to norm)"
    plain = Model(lambda model, name, tensor: model.norm.data.copy_(tensor))
    receiver.load(plain, [(request_of(written, known=3), area)])
    assert written.problem(1) == "3 buckets were announced, 0 are known"
    written._words[1] = -1  # not complete
    receiver.load(plain, [(request_of(written, limit_s=0.05), area)])
    assert written.problem(1) == "of the trainer, after 1 buckets: nothing for 0.05 s"
    written.give_up()
    receiver.load(plain, [(request_of(written), area)])
    assert written.problem(1) == "the trainer gave up after 0 buckets"
    written.remove()
    receiver.load(plain, [(request_of(written), area)])  # nobody is left to tell


def test_nobody_waits_for_a_process_that_has_ended() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while is_alive(ended.pid):  # until then it runs; afterwards it waits for its parent
        time.sleep(0.01)
    began = time.monotonic()
    assert wait_until(lambda: False, lambda: ended.pid, 60.0) == f"process {ended.pid} has ended"
    assert time.monotonic() - began < 30
    ended.wait()
    assert not is_alive(ended.pid) and is_alive(os.getpid())
    assert wait_until(lambda: False, lambda: 0, 0.01) == "nothing for 0.01 s" and wait_until(lambda: True, lambda: 0, 0.0) is None
