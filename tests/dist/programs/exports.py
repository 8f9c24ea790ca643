"""Everything that writes a model, each into a folder of its own, from a model whose configuration says another type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlx.config.schema import Config, DataConfig, FinetuneConfig, ModelConfig, RewardConfig
from rlx.parallel.context import ParallelContext
from rlx.sync.transports.disk import DiskLane
from rlx.trainer.finetune_worker import FinetuneWorker
from rlx.trainer.link import sync_folder
from rlx.trainer.worker import Worker
from rlx.types.weights import TensorInfo, WeightChunk
from tests.dist.programs.layouts import context_of, main


def write_all(config: Config, out: Path, context: ParallelContext) -> None:
    """``out/export``, ``out/checkpoint`` (Megatron), ``out/version-7``, ``out/reward-model``."""
    worker = Worker(config, context)
    worker.export(str(out / "export"))
    assert worker.policy.trainable is not None and worker.critic is not None and worker.critic.trainable is not None
    for trainable in (worker.policy.trainable, worker.critic.trainable):
        for part in trainable._parts():
            part._init_optimizer_states_with_dummy_values()  # as after a step
    worker.save(str(out / "checkpoint"))
    tensors = dict(worker.policy.weights())
    infos = [
        TensorInfo(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in tensors.items()
    ]
    folder = replace(sync_folder(config.run.dir, config.sync.dir, worker.policy.companions), path=out)
    lane = DiskLane((), folder, 0, {info.name: info.shape for info in infos}, 30.0)
    lane.depart(WeightChunk(infos=tuple(infos), tensors=tuple(tensors.values()), flattened=False), 7)
    judge = FinetuneWorker(replace(config, finetune=FinetuneConfig(objective="rm")), context)
    judge.export(str(out / "reward-model"))


def program(arguments: dict[str, Any], world_size: int) -> None:
    with context_of({}, world_size) as context:
        for dtype, folder in arguments["folders"].items():
            model = ModelConfig(path=arguments["model"], tokenizer_path=arguments["tokenizer"], dtype=dtype)
            data = DataConfig(train="", chat_template=arguments["chat_template"])
            Path(folder).mkdir()
            (Path(folder) / "checkpoint").mkdir()
            write_all(Config(model=model, data=data, reward=RewardConfig(name="exact")), Path(folder), context)


if __name__ == "__main__":
    main(program)
