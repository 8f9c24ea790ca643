"""Checksums as SGLang calculates them, from Hugging Face tensors; what they prove, and whom they accuse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
from torch import Tensor

from rlx.rollout.keys import new_keys
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import Crew, PublisherPlace
from rlx.sync.errors import CanaryError
from rlx.sync.group import Endpoint, Engine
from rlx.sync.proof import checksums
from rlx.sync.proof.by_checksums import ChecksumProof
from rlx.sync.proof.checksums import Checksums, TileHash
from rlx.types.precision import FP32
from tests.unit.rollout_client.admin_peer import AdminPeer

WORD = 2**32 - 1
LAYERS = 4


def mixed(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B & WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & WORD
    return word ^ word >> 16


def turned(word: int, count: int) -> int:
    return (word << count | word >> 32 - count) & WORD


def tile_hash(raw: bytes) -> str:
    """SGLang's kernel, word by word."""
    raw += b"\0" * (-len(raw) % 4)
    words = [int.from_bytes(raw[start : start + 4], "little") for start in range(0, len(raw), 4)]
    seeds = 0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & WORD
    total = 0
    for start in range(0, len(words), 8192):
        sums = [0, 0]
        for place, word in enumerate(words[start : start + 8192], start):
            sums[0] += mixed(word ^ (place * 0x27D4EB2D + seeds[0] & WORD) ^ turned(place, 15))
            sums[1] += mixed(word ^ (place * 0x165667B1 + seeds[1] & WORD) ^ turned(place, 13))
        first, second = (mixed((value & WORD) ^ len(raw) & WORD) for value in sums)
        total += first << 32 | second
    total &= 2**64 - 1
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    total = (total ^ total >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return f"{total ^ total >> 31:016x}"


@pytest.mark.parametrize("sizes", [[1], [7], [32768], [32768, 4], [40000, 4, 1000, 30001]])
def test_the_hash_of_gpus(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and in more than one go a piece."""
    monkeypatch.setattr(checksums, "_BLOCK", 5000)
    whole = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8)
    found = TileHash()
    for piece in whole.split(sizes):
        found.update(piece)
    assert found.checksum() == tile_hash(bytes(whole.tolist()))


def head(*rows: Tensor) -> str:
    return hashlib.sha256(b"".join(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)).hexdigest()[:16]


def model() -> dict[str, Tensor]:
    found = {"model.embed_tokens.weight": torch.randn(70, 8), "model.norm.weight": torch.randn(8)}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        found |= {f"{attention}.{name}_proj.weight": torch.randn(rows, 8) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
        found |= {f"{attention}.{name}_proj.bias": torch.randn(rows) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
        found[f"{attention}.o_proj.weight"] = torch.randn(8, 8)
        for expert in (1, 0, 2):  # experts of other ranks come between
            names = (("down", (8, 6)), ("up", (6, 8)), ("gate", (6, 8)))
            found |= {f"{mlp}.experts.{expert}.{name}_proj.weight": torch.randn(shape) for name, shape in names}
    return found


def held_by_sglang(tensors: dict[str, Tensor], tp: int, rank: int) -> dict[str, str]:
    """Spelt out."""
    share = {name: tensor.tensor_split(tp)[rank] for name, tensor in tensors.items()}
    columns = {name: tensor.tensor_split(tp, dim=-1)[rank] for name, tensor in tensors.items()}
    vocabulary = torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(58, 8)]).tensor_split(tp)[rank]
    found = {"model.embed_tokens.weight": head(vocabulary), "model.norm.weight": head(tensors["model.norm.weight"])}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp.experts"
        for leaf in ("weight", "bias"):
            found[f"{attention}.qkv_proj.{leaf}"] = head(*(share[f"{attention}.{name}_proj.{leaf}"] for name in "qkv"))
        found[f"{attention}.o_proj.weight"] = head(columns[f"{attention}.o_proj.weight"])
        pairs = [share[f"{mlp}.{expert}.{name}_proj.weight"] for expert in range(3) for name in ("gate", "up")]
        found[f"{mlp}.w13_weight"] = head(*pairs)
        found[f"{mlp}.w2_weight"] = head(*(columns[f"{mlp}.{expert}.down_proj.weight"] for expert in range(3)))
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_what_sglang_holds_of_a_model(tp: int) -> None:
    tensors = model()
    wanted = [held_by_sglang(tensors, tp, rank) for rank in range(tp)]
    book = Checksums(wanted[0].keys(), tp, torch.float32)
    for name, tensor in tensors.items():
        book.add(name, tensor)
    assert book.found() == {name: [rank[name] for rank in wanted] for name in wanted[0]}


def test_what_would_hold_too_much_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_HELD_BYTES", 300)
    tensors = model()
    names = held_by_sglang(tensors, 1, 0)
    book = Checksums(names.keys(), 1, torch.float32)
    for name, tensor in tensors.items():
        book.add(name, tensor)
    assert {name for name, sums in book.found().items() if not sums} == {name for name in names if name.endswith("w13_weight")}


@pytest.fixture
def publish() -> Iterator[Callable[..., object]]:
    """Sends a model to an engine that holds what it is told to."""
    keys = new_keys()
    peer = AdminPeer(sessions=True, flushes_paused=True, keys=keys)
    control = EngineControl(peer.url, timeout_s=5, keys=keys)
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    crew = Crew(place, (Engine(endpoint=Endpoint(url=peer.url), control=control),), lambda text: [text], 5)
    proof = ChecksumProof(crew, FP32)

    def send(tensors: dict[str, Tensor], held: dict[str, str] | None):
        peer.checksums = None if held is None else [held]
        passed = dict(proof.watch("sync", iter(tensors.items())))
        assert passed.keys() == tensors.keys()
        return proof.judge("sync").get(peer.url)

    with closing(control):
        yield send
    peer.close()


def test_equal_tensors_are_proved_and_another_is_named(publish: Callable[..., object]) -> None:
    tensors = model()
    held = held_by_sglang(tensors, 1, 0)
    found = publish(tensors, held)
    assert found.is_proof and found.num_tensors == len(held)
    name = "model.layers.2.self_attn.qkv_proj.weight"
    with pytest.raises(CanaryError, match=rf"phase checksums: engine http\S+ holds other weights than it was sent: {name}$"):
        publish(tensors, held | {name: "0" * 16})
    # There is but one of its kind, which was equal before.
    with pytest.raises(CanaryError, match=r"model\.norm\.weight"):
        publish(tensors, held | {"model.norm.weight": "0" * 16})


def test_what_an_engine_holds_in_its_own_way_accuses_nobody(publish: Callable[..., object]) -> None:
    tensors = model()
    held = held_by_sglang(tensors, 1, 0)
    other = {name: "0" * 16 for name in held if "qkv" in name or name == "model.norm.weight"}
    found = publish(tensors, held | other)
    assert not found.is_proof and not found.culprits and found.num_tensors == len(held) - len(other)
    assert "9 parameters in a way unknown here" in found.refusals[0]


def test_an_engine_without_checksums_proves_nothing(publish: Callable[..., object]) -> None:
    assert publish(model(), None) is None
