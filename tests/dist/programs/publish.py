"""Ranks that load weights into Megatron models, publish them to running engines and export them.

Arguments: ``cases``, a list of {layout, weights (folder), url (or urls), tp, api_key, admin_key, version, export (folder),
transport}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import expected_shapes
from rlx.config.schema import SyncConfig
from rlx.models.build import BuildOptions, build_model
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.io import export_hf, load_hf, stage_weights
from rlx.parallel.context import ParallelContext
from rlx.rollout.keys import EngineKeys
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.handover import Seats
from rlx.trainer.link import spread_over_stages
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.precision import FP32
from tests.dist.programs.layouts import context_of, main


@contextmanager
def disturbed(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Every parameter a little off meanwhile."""
    kept = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.01)
    yield
    with torch.no_grad():
        for parameter, value in zip([p for chunk in chunks for p in chunk.parameters()], kept, strict=True):
            parameter.copy_(value)


def publish(case: dict[str, Any], context: ParallelContext) -> None:
    arch = read_architecture(case["weights"])
    chunks = build_model(arch, context, BuildOptions(precision=FP32, layer_spec="torch", recompute="none", seed=1))
    load_hf(chunks, arch, case["weights"], context)
    model = RankModel(
        arch=arch, chunks=chunks, head=token_head(context, arch), context=context, companions=Companions.of(case["weights"])
    )
    everywhere = case["transport"] == "ipc"
    speaks = everywhere or (not context.dp_rank and not context.cp_rank)

    def weights():
        return (
            stage_weights(chunks, arch, context, everywhere=everywhere, room=lambda size: publisher.room(size))
            if speaks
            else iter(())
        )

    canary = CanarySpec(
        vocab_size=arch.vocab_size,
        seed=3,
        precision=FP32,
        score_on_trainer=lambda rows, images: score_sequences(model, rows, 256, images),
        export=weights,
    )
    place = PublisherPlace(
        stage=context.pp_rank,
        num_stages=context.dims.pp,
        is_sender=context.is_sender,
        is_lead=context.rank == 0,
        rank=context.rank,
    )
    urls, world_size = case.get("urls") or [case["url"]], context.dims.world_size
    target = PublisherTarget(
        endpoints=tuple(Endpoint(url=url, tp=case["tp"], index=index) for index, url in enumerate(urls)),
        expected=expected_shapes(arch),
        backend="gloo",
        device=torch.device("cpu"),
        keys=EngineKeys(api_key=case["api_key"], admin_key=case["admin_key"]),
        transport=case["transport"],
        seats=Seats(
            by_engine={index: [(3 * index + rank) % world_size for rank in range(case["tp"])] for index in range(len(urls))},
            spread=spread_over_stages(context) if context.dims.pp > 1 else None,
        ),
    )
    # Small enough that even these models go in several chunks of both kinds.
    config = SyncConfig(
        bucket_bytes=15_000 if everywhere else 40_000, flatten_below_bytes=10_000, timeout_s=90, canary_tolerance=1e-4
    )
    publisher = Publisher(place, target, config, context.gather_objects, canary)
    # Other weights first: what the engine remembers of the first publication must serve the second.
    with disturbed(chunks):
        publisher.publish(case["version"] - 1, weights())
    publisher.publish(case["version"], weights())
    publisher.close()
    export_hf(chunks, arch, companions=Companions.of(case["weights"]), target=case["export"], context=context)


def program(arguments: dict[str, Any], world_size: int) -> None:
    for case in arguments["cases"]:
        with context_of(case["layout"], world_size) as context:
            publish(case, context)
    Path(arguments["out"]).touch()


if __name__ == "__main__":
    main(program)
