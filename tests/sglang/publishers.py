"""The trainer's side of weight sync, without a trainer: a publisher of one transformers model to one engine."""

from __future__ import annotations

from pathlib import Path

import torch

from rlx.config.schema import SyncConfig
from rlx.models.hf.companions import Companions
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.engine_memory import Sharing
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.disk import SyncFolder
from rlx.sync.transports.handover import Seats
from rlx.types.precision import FP32
from tests.sglang.engines import RunningEngine
from tests.sglang.models import VOCAB


def make_publisher(
    engine: RunningEngine,
    model,
    canary: CanarySpec,
    *,
    transport: str = "broadcast",
    sharing: Sharing | None = None,
    folder: Path | None = None,
    constant: frozenset[str] = frozenset(),
    **sync,
) -> Publisher:
    """``sync`` are keys of SyncConfig."""
    target = PublisherTarget(
        endpoints=(Endpoint(url=engine.url, tp=engine.tp),),
        expected={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        backend="gloo",
        device=torch.device("cpu"),
        keys=engine.keys,
        transport=transport,
        folder=None if folder is None else SyncFolder(path=folder, companions=Companions.of(engine.model)),
        sharing=sharing,
        constant=constant,
        seats=Seats(by_engine={0: [0] * engine.tp}),
    )
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    config = SyncConfig(**({"bucket_bytes": 30_000, "timeout_s": 60} | sync))
    return Publisher(place, target, config, lambda text: [text], canary)


def canary_of(score_on_trainer, export=None) -> CanarySpec:
    return CanarySpec(vocab_size=VOCAB, seed=7, precision=FP32, score_on_trainer=score_on_trainer, export=export)
