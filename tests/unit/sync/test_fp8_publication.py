"""A publication to an engine of FP8 weights: what arrives, what is proved of it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlx.arch.engine_format import QUANTIZATION, engine_format
from rlx.arch.families.registry import architecture_of
from rlx.config.schema import SyncConfig
from rlx.models.hf.companions import Companions
from rlx.rollout.keys import new_keys
from rlx.rollout.sglang import receiver
from rlx.rollout.sglang.shared_tensors import RECEIVER, open_bucket, open_request
from rlx.sync.chunks import chunks, unflatten
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.engine_tensors import dequantize, quantize
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.disk import SyncFolder
from rlx.sync.transports.handover import Seats
from rlx.types.precision import BF16, in_fp8
from tests.unit.rollout_client.admin_peer import AdminPeer
from tests.unit.sync.test_engine_format import MOE, QWEN

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class Fp8Engine(AdminPeer):
    """Loads what it is sent as SGLang does, and sums up the numbers that its 8 bits stand for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(sessions=False, flushes_paused=True, keys=new_keys())
        self.folder, self.held = folder, dict[str, Tensor]()
        self.swapped: tuple[str, ...] = ()

    def answer(self, method: str, path: str, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/model_info":
            return 200, {"model_path": str(self.folder), "weight_version": "0"}
        if path == "/generate":
            return 200, {"meta_info": {"input_token_logprobs": [[-1.0, token, None] for token in body["input_ids"]]}}
        if path == "/update_weights_from_tensor" and body["load_format"] == RECEIVER:
            receiver.load(self, open_request(body["serialized_named_tensors"][0]))
        elif path == "/update_weights_from_tensor":
            buffer, infos = open_bucket(body["serialized_named_tensors"][0])
            self.held |= {info.name: part.clone() for info, part in zip(infos, unflatten(buffer, infos), strict=True)}
        if path == "/update_weights_from_disk":
            self.held = {
                name: t for file in Path(body["model_path"]).glob("*.safetensors") for name, t in load_file(file).items()
            }
        if path == "/weights_checker" and self.held:
            self.checksums = [self.sums()]
        return super().answer(method, path, key, body)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.held.items()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            assert self.held[name].dtype == tensor.dtype
            self.held[name].copy_(tensor)

    def sums(self) -> dict[str, str]:
        scaled = {name: self.held.get(name + "_scale_inv") for name in self.held if not name.endswith("_scale_inv")}
        numbers = {
            name: self.held[name] if scales is None else dequantize(self.held[name], scales, torch.bfloat16)
            for name, scales in scaled.items()
        }
        fused: dict[str, list[tuple[tuple[int, int], Tensor]]] = {}
        for name, tensor in numbers.items():
            target, order = place(name)
            fused.setdefault(target, []).append((order, tensor))
        return {
            target: hashlib.sha256(b"".join(bits(tensor) for _, tensor in sorted(parts, key=lambda part: part[0]))).hexdigest()[
                :16
            ]
            for target, parts in fused.items()
        }


def place(name: str) -> tuple[str, tuple[int, int]]:
    """Where SGLang puts a tensor."""
    expert = re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", name)
    if expert:
        return f"{expert[1]}.{'w2' if expert[3] == 'down' else 'w13'}_weight", (int(expert[2]), expert[3] == "up")
    module = name.split(".")[-2]
    order = list(FUSED).index(module) if module in FUSED else 0
    return name.replace(f".{module}.", f".{FUSED.get(module, module)}."), (0, order)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Fp8Engine]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN | {"quantization_config": dict(QUANTIZATION)}))
    peer = Fp8Engine(tmp_path / "model")
    yield peer
    peer.close()


def publisher_to(engine: Fp8Engine, config: dict[str, Any], transport: str, **target: Any) -> Publisher:
    wanted = engine_format(architecture_of(config), fp8=True)
    companions = replace(Companions.of(engine.folder), quantization=QUANTIZATION)
    full = PublisherTarget(
        endpoints=(Endpoint(url=engine.url),),
        expected=wanted.shapes,
        fp8=wanted.converted,
        backend="gloo",
        device=torch.device("cpu"),
        keys=engine.keys,
        transport=transport,
        seats=Seats(by_engine={0: [0]}, weight_bytes=2),
        folder=SyncFolder(path=engine.folder.parent / "sync", companions=companions),
    )
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    canary = CanarySpec(
        vocab_size=config["vocab_size"],
        seed=1,
        precision=in_fp8(BF16),
        score_on_trainer=lambda rows, images: [[-1.2] * (len(row) - 1) for row in rows],
        export=lambda: pytest.fail("8 bits are not compared one by one"),
    )
    sync = SyncConfig(bucket_bytes=100_000, flatten_below_bytes=2000, timeout_s=30)
    return Publisher(place, replace(full, **target), sync, lambda text: [text], canary)


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape).bfloat16() for name, shape in engine_format(architecture_of(config), fp8=False).shapes.items()
    }


@pytest.mark.parametrize("transport", ["ipc", "shm", "disk"])
@pytest.mark.parametrize("config", [QWEN, MOE], ids=["dense", "experts"])
def test_engines_are_sent_blocks_and_scales_and_these_are_proved(engine: Fp8Engine, config, transport: str) -> None:
    wanted, tensors = engine_format(architecture_of(config), fp8=True), weights(config)
    dtypes = {name: getattr(torch, wanted.dtypes.get(name, "bfloat16")) for name in wanted.expected}
    engine.held = {name: torch.zeros(shape).to(dtypes[name]) for name, shape in wanted.expected.items()}
    publisher = publisher_to(engine, config, transport)
    manifest = publisher.publish(1, iter(tensors.items()))
    assert {info.name: info.shape for info in manifest.tensors} == wanted.expected
    assert {info.name: info.dtype for info in manifest.tensors} == {**dict.fromkeys(wanted.shapes, "bfloat16"), **wanted.dtypes}
    assert manifest.num_bytes == wanted.num_bytes(2)
    for name, tensor in tensors.items():
        if name in wanted.converted:
            blocks, scales = quantize(tensor)
            assert bits(engine.held[name]) == bits(blocks) and torch.equal(engine.held[name + "_scale_inv"], scales)
        else:
            assert torch.equal(engine.held[name], tensor)
    # Off by 0.2 nats, which is no fault in FP8; every parameter is proved.
    assert manifest.canary is not None and manifest.canary.difference == pytest.approx(0.2)
    assert manifest.canary.num_proved == len(engine.sums()) and not manifest.canary.doubts
    if transport == "disk":
        described = json.loads((engine.folder.parent / "sync" / "version-1" / "config.json").read_text())
        assert described["quantization_config"] == QUANTIZATION and described["dtype"] == "bfloat16"
    publisher.publish(2, iter(weights(config).items()))
    publisher.close()


def test_one_wrong_byte_is_named(engine: Fp8Engine) -> None:
    publisher, tensors = publisher_to(engine, QWEN, "shm"), weights(QWEN)
    engine.held = dict(tensors)
    honest = engine.sums

    def wrong() -> dict[str, str]:
        name = "model.layers.1.mlp.down_proj.weight_scale_inv"
        if name in engine.held:
            engine.held[name][0, 0] *= 1.5
        return honest()

    engine.sums = wrong  # type: ignore[method-assign]
    with pytest.raises(CanaryError, match=r"holds other weights than it was sent: model\.layers\.1\.mlp\.down_proj\.weight$"):
        publisher.publish(1, iter(tensors.items()))
    publisher.close()


def test_scores_that_no_rounding_explains_are_a_fault_though_the_bytes_are_right(engine: Fp8Engine) -> None:
    tensors = weights(QWEN)
    engine.held = dict(tensors)
    publisher = publisher_to(engine, QWEN, "shm")
    spec = publisher._canary
    assert spec is not None
    publisher._canary = replace(spec, score_on_trainer=lambda rows, images: [[-2.7] * (len(row) - 1) for row in rows])
    with pytest.raises(CanaryError, match="another configuration of the model"):
        publisher.publish(1, iter(tensors.items()))
    publisher.close()


def test_an_engine_of_another_format_is_refused_before_anything_is_sent(engine: Fp8Engine) -> None:
    publisher = publisher_to(engine, QWEN, "shm", fp8=frozenset())
    with pytest.raises(SyncError, match=r"has a quantization_config, but rollout\.fp8 is false"):
        publisher.publish(1, iter(()))
    publisher.close()
    (engine.folder / "config.json").write_text(json.dumps(QWEN))
    publisher = publisher_to(engine, QWEN, "shm")
    with pytest.raises(SyncError, match=r"has no quantization_config, but rollout\.fp8 is true"):
        publisher.publish(1, iter(()))
    publisher.close()
    assert not [path for path in engine.paths() if path.startswith("/update")]


def test_numbers_of_8_bits_travel_as_bytes() -> None:
    """A group may not know their type."""
    blocks, scales = quantize(torch.randn(300, 300))
    plain = torch.randn(40, 40)
    cut = list(chunks(iter([("a.weight", blocks), ("a.weight_scale_inv", scales), ("b.weight", plain)]), 2**20, 10))
    assert {info.name: chunk.flattened for chunk in cut for info in chunk.infos} == {
        "a.weight": True,
        "a.weight_scale_inv": False,
        "b.weight": False,
    }
