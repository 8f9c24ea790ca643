"""What several packages need of a configuration, put together once: the models that a run loads, the folders that it
writes to, and what its engines serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlx.config.schema import ClusterConfig, Config, RolloutConfig
from rlx.types.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """``has_head``: a head of scores or values stands in the place of the output layer."""

    folder: str
    has_head: bool = False


def loaded_models(config: Config) -> dict[str, LoadedModel]:
    """The models that a run loads, by the keys that name their folders."""
    model = config.model
    found = {"model.path": LoadedModel(folder=model.path, has_head=config.finetune.objective == "rm")}
    if config.has_reference:
        found["model.reference_path"] = LoadedModel(folder=model.reference_path or model.path)
    if config.trains_critic:
        judges_tokens = config.algorithm.name == "prime"
        found["model.critic_path"] = LoadedModel(folder=model.critic_path or model.path, has_head=not judges_tokens)
    return found


def written_folders(config: Config) -> dict[str, str]:
    """Key to folder, of what a run writes outside its own folder."""
    if config.is_finetuning or config.rollout.replay is not None:
        return {}
    folders = {"sync.dir": config.sync.dir} if config.transport == "disk" and config.sync.dir is not None else {}
    record = {} if config.rollout.record is None else {"rollout.record": str(Path(config.rollout.record).parent)}
    return folders | record


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the engines of a run serve and how they are started; ``num_started`` 0: the run starts none itself. ``timeout_s`` is
    the limit of one request of a weight sync, ``requests_at_once`` what each engine has to answer at a time."""

    rollout: RolloutConfig
    cluster: ClusterConfig
    model_path: str
    precision: Precision
    transport: str
    timeout_s: float
    seed: int
    num_started: int
    num_trainer_ranks: int
    requests_at_once: int = 512
    tower_learns: bool = False

    @classmethod
    def of(cls, config: Config) -> EngineSettings:
        return cls(
            rollout=config.rollout,
            cluster=config.cluster,
            model_path=config.model.path,
            precision=config.engine_precision,
            transport=config.transport,
            timeout_s=config.sync.timeout_s,
            seed=config.run.seed,
            num_started=config.rollout.num_engines if config.starts_engines else 0,
            num_trainer_ranks=config.num_trainer_ranks,
            requests_at_once=-(-_requests(config) // config.rollout.num_engines),
            tower_learns=config.model.vision != "frozen",
        )


def _requests(config: Config) -> int:
    """Over all engines: a step's answers (an evaluation's may be more), as far as they may be in flight."""
    return min(config.rollout.max_concurrent_requests, config.data.prompts_per_step * config.rollout.samples_per_prompt)
