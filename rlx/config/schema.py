"""Every setting of a run, its type, default and meaning. One home per value; nobody writes to it after loading.

Field help is the ``doc`` metadata; ``choices`` lists the allowed strings. ``rlx check`` prints the resolved tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx.arch.vision import LEARNING
from rlx.config.algorithm import AlgorithmConfig as AlgorithmConfig
from rlx.config.finetune import WITH_REFERENCE
from rlx.config.finetune import FinetuneConfig as FinetuneConfig
from rlx.config.options import option, required
from rlx.config.sources import EvaluationConfig as EvaluationConfig
from rlx.config.sources import SourceConfig
from rlx.types.layout import ParallelDims
from rlx.types.precision import PRECISIONS, Precision, in_fp8, precision_of

MOST = 2**16  # ranks, machines, engines: a plan of more than anybody has must not be what fills the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run itself."""

    dir: str = option("runs/default", "run folder: metrics, logs, checkpoints, export")
    seed: int = option(0, "seed of data order, initialisation of the value head and sampling", minimum=0)
    steps: int = option(100, "rollout-and-update iterations; fine-tuning: optimizer steps", minimum=1)
    max_empty_steps: int = option(10, "iterations in a row with nothing to train on that end the run", minimum=1)
    resume: str = option("never", "auto: go on from the newest whole checkpoint of run.dir", choices=("auto", "never"))
    overwrite: bool = option(False, "remove the run that run.dir already holds (metrics, checkpoints, export, logs)")
    export_hf: bool = option(True, "write the final policy to RUN_DIR/hf")
    failure_timeout_s: float = option(600.0, "limit of any one wait between processes", minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Where processes live."""

    launcher: str = option("local", "who starts the processes", choices=("local", "torchrun", "ray"))
    device: str = option("auto", "auto: cuda when visible, else cpu, which hides all GPUs", choices=("auto", "cpu", "cuda"))
    num_trainer_ranks: int | None = option(None, "trainer processes; none: tp x pp x cp", minimum=1, maximum=MOST)
    nodes: int | None = option(None, "machines, all alike; none: one, or as many as the launcher has", minimum=1, maximum=MOST)
    gpus_per_node: int | None = option(None, "GPUs of each machine; none: not planned", minimum=1, maximum=MOST)
    nvlink_gpus: int | None = option(None, "GPUs of a machine that NVLink joins; none: all of them", minimum=1, maximum=MOST)
    gpu_memory_gib: float = option(80.0, "memory of each GPU, for the estimate of `rlx check`", minimum=1)
    rollout_nodes: int = option(0, "machines for engines only; 0: engines sit beside trainers", minimum=0, maximum=MOST)
    colocated: bool = option(False, "engines sit on the trainer ranks' GPUs, and the two take turns; rollout.tp GPUs an engine")
    offload: str = option(
        "auto",
        "what co-located trainers keep in host memory while engines generate; all: weights too; auto: optimizer on GPUs",
        choices=("auto", "none", "optimizer", "all"),
    )
    ray_address: str | None = option(
        None, "Ray cluster HOST:PORT; none: RAY_ADDRESS, else one that runs here, else an own one", may_be_empty=True
    )
    ray_wait_s: float = option(60.0, "limit for a Ray cluster to have the nodes and room that the job needs", minimum=0)
    threads_per_rank: int | None = option(
        None,
        "CPU threads of a trainer rank or engine; none: OMP_NUM_THREADS, else the machine's cores / its ranks (engines: / its"
        " engines), as the two take turns",
        minimum=1,
        maximum=MOST,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The policy's body; reference and critic are built on the same architecture."""

    path: str = required(
        "Hugging Face folder, hub id (owner/name) or converted checkpoint of the policy (and of the reference and critic unless"
        " named)"
    )
    reference_path: str | None = option(None, "Hugging Face folder or hub id of the reference; none: model.path")
    critic_path: str | None = option(None, "Hugging Face folder or hub id of the critic's body; none: model.path")
    tokenizer_path: str | None = option(None, "tokenizer folder or hub id; none: model.path")
    dtype: str = option("fp32", "type of weights and activations", choices=tuple(PRECISIONS))
    fp32_head: bool = option(False, "keep the logits of a bf16 output layer in fp32, in trainers and the engines that rlx starts")
    layer_spec: str = option(
        "auto", "layers: auto takes transformer_engine on GPUs that have it", choices=("auto", "torch", "transformer_engine")
    )
    recompute: str = option("none", "activation recomputation", choices=("none", "selective", "full"))
    recompute_layers: int | None = option(
        None, "with recompute full: layers of each pipeline stage that it takes, its first ones; none: all", minimum=1
    )
    moe_aux_loss_coefficient: float = option(
        0.0, "weight of the experts' load-balancing loss (sequence by sequence, summed over layers)", minimum=0
    )
    moe_z_loss_coefficient: float = option(0.0, "weight of the routers' z-loss (Zoph et al. 2022)", minimum=0)
    vision: str = option("frozen", "what of a vision tower learns: all, its projector, nothing", choices=LEARNING)

    @property
    def precision(self) -> Precision:
        """The trainers'."""
        return precision_of(self.dtype, fp32_head=self.fp32_head)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The layout of every trained model. Data parallelism is what remains of the ranks."""

    tp: int = option(1, "tensor parallel size", minimum=1, maximum=MOST)
    pp: int = option(1, "pipeline parallel size", minimum=1, maximum=MOST)
    vpp: int = option(1, "virtual pipeline chunks a stage", minimum=1, maximum=MOST)
    cp: int = option(1, "context parallel size", minimum=1, maximum=MOST)
    ep: int = option(1, "expert parallel size", minimum=1, maximum=MOST)
    etp: int | None = option(None, "tensor parallel size inside experts; none: tp", minimum=1, maximum=MOST)
    sequence_parallel: bool = option(False, "split norms and dropout over tp along the sequence")

    def dims(self, world_size: int) -> ParallelDims:
        """The layout of so many ranks; ValueError when they do not fit it."""
        return ParallelDims(
            world_size=world_size,
            tp=self.tp,
            pp=self.pp,
            vpp=self.vpp,
            cp=self.cp,
            ep=self.ep,
            etp=self.etp,
            sequence_parallel=self.sequence_parallel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts, or the examples of fine-tuning: one file (train) or a mixture of prompts (sources). [data.md](data.md) has the
    rules."""

    train: str | None = option(
        None,
        "prompts (or examples) to train on: a .jsonl or .parquet file or a folder of them, owner/name:split of the hub,"
        " reasoning-gym:TASK or drawn:TASK; or name data.sources",
    )
    sources: Mapping[str, SourceConfig] = option({}, "a mixture of prompts instead of data.train: NAME -> source (keys below)")
    prompts_per_step: int = option(8, "prompts of one rollout batch", minimum=1)
    prompt_key: str = option("prompt", "column of a text prompt")
    messages_key: str = option("messages", "column of a chat (list of role/content); wins over prompt_key where present")
    tools_key: str | None = option("tools", "column of the tools (JSON schemas) that a chat's template writes; none: no column")
    images_key: str | None = option(
        "images", "column of images (paths beside the file, bytes, base64) for models with a vision tower; none: no column"
    )
    bad_images: str = option(
        "error", "an image that cannot be used ends the run, or its row is counted and left out", choices=("error", "drop")
    )
    min_pixels: int | None = option(None, "smaller images are enlarged; none: what the model's image processor says", minimum=1)
    max_pixels: int | None = option(None, "larger images are reduced; none: what the model's image processor says", minimum=1)
    label_key: str = option("label", "column of the ground truth; column.field reaches into one, as in the other keys")
    system_prompt: str | None = option(
        None, "system message of chats that have none; makes a text prompt a chat", may_be_empty=True
    )
    max_prompt_tokens: int = option(1024, "limit of a prompt", minimum=1)
    overlong: str = option(
        "drop", "longer prompts are left out, or keep their last tokens; counted", choices=("drop", "truncate")
    )
    shuffle: bool = option(True, "a new seeded order each epoch")
    curriculum_key: str | None = option(None, "column of numbers to order epochs by, low to high; column.field reaches into one")
    curriculum_epochs: int = option(1, "epochs of each source in that order; later ones as data.shuffle says", minimum=1)
    chat_template: str | None = option(None, "Jinja file used instead of the tokenizer's own chat template")
    template_date: str | None = option(
        None, "the day, as 2025-01-31, of chat templates that write today's date; none: that of the run's first start"
    )

    @property
    def by_name(self) -> Mapping[str, SourceConfig]:
        """Every source; the one of ``train`` is called ""."""
        return self.sources if self.train is None else {"": SourceConfig(path=self.train)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Engines and sampling."""

    engine: str = option("embedded", "what serves the rollouts", choices=("embedded", "sglang"))
    num_engines: int = option(1, "engine processes to start", minimum=1, maximum=MOST)
    tp: int = option(1, "tensor parallel ranks (GPUs) of each engine", minimum=1, maximum=MOST)
    python: str | None = option(None, "interpreter of the environment that holds sglang; none: rlx's own")
    endpoints: list[str] = option([], "URLs of servers that already run; then none is started")
    dtype: str = option("auto", "engine weights; auto: model.dtype", choices=("auto", *PRECISIONS))
    fp8: bool = option(False, "SGLang holds the matrices of the layers in FP8, blocks of 128 x 128; weights are sent so")
    samples_per_prompt: int = option(1, "answers to each prompt", minimum=1)
    max_new_tokens: int = option(256, "response limit", minimum=1)
    temperature: float = option(1.0, "0 is greedy", minimum=0)
    top_p: float = option(1.0, "nucleus sampling; must be 1 unless algorithm handles it", above=0, maximum=1)
    top_k: int = option(-1, "-1: off", minimum=-1)
    stop_token_ids: list[int] = option([], "further stop tokens beside the tokenizer's end of sequence")
    max_concurrent_requests: int = option(512, "requests in flight over all engines", minimum=1)
    request_timeout_s: float = option(300.0, "limit of one generation request", minimum=0.1)
    max_retries: int = option(3, "retries of a request on connection errors and HTTP 5xx", minimum=0)
    start_timeout_s: float = option(300.0, "limit for an engine to become healthy", minimum=1)
    release: str = option(
        "auto",
        "what co-located engines give back while trainers work: key-value cache, or weights too; auto: all on GPUs",
        choices=("auto", "none", "kv_cache", "all"),
    )
    max_restarts: int = option(3, "restarts of each engine that dies or answers wrongly; 0: its end is the run's", minimum=0)
    record: str | None = option(None, "write every rollout group to this JSONL file")
    replay: str | None = option(None, "take rollouts from this file; no engine is started")
    server_args: Mapping[str, Any] = option({}, "further server arguments by their own names")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """The verifier."""

    name: str = option(
        "", "a verifier of docs/rewards.md, or path/to/file.py:function; required for `rlx train`", may_be_empty=True
    )
    args: Mapping[str, Any] = option({}, "arguments of the verifier, by name")
    num_workers: int = option(1, "verifier processes (threads for remote verifiers)", minimum=1, maximum=MOST)
    timeout_s: float = option(30.0, "limit of one verdict", minimum=0.01)
    memory_mb: int = option(2048, "memory that one verdict may take beside what its process holds at its start", minimum=16)
    skip_special_tokens: bool = option(
        False, "leave all special tokens out of the text that verifiers see; false: only those that end or pad an answer"
    )
    max_abs: float = option(1e6, "a reward (or part of one) beyond this, up or down, is invalid", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = option(1e-6, "peak learning rate", minimum=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up, from 0 in the first on, as in transformers", minimum=0)
    decay_steps: int | None = option(None, "optimizer steps to min_lr; none: run.steps x steps an iteration", minimum=1)
    schedule: str = option("constant", "shape after warm-up", choices=("constant", "linear", "cosine"))
    vision_lr_scale: float = option(1.0, "factor on lr and min_lr for what of a vision tower learns", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay", minimum=0)
    beta1: float = option(0.9, "Adam", minimum=0, below=1)
    beta2: float = option(0.95, "Adam", minimum=0, below=1)
    eps: float = option(1e-8, "Adam", above=0)
    clip_grad: float = option(1.0, "global gradient norm limit; 0: off", minimum=0)
    distributed: bool = option(True, "shard optimizer state over data-parallel ranks")
    offload: bool = option(False, "optimizer state in host memory during training, where CPUs step on it; with distributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How samples are packed."""

    max_tokens_per_micro_batch: int = option(8192, "token budget of one packed forward pass on one rank's cp group", minimum=1)
    max_patches_per_micro_batch: int | None = option(None, "patches of its different images; none: no limit", minimum=1)
    pad_to_multiple_of: int | None = option(
        None, "tokens; micro-batches are lengthened to few sizes. none: 64 of them on GPUs, 1 on CPUs", minimum=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """Publishing weights to engines."""

    transport: str = option(
        "auto",
        "stream: a group with every engine and rlx's receiver in it; broadcast: a group, SGLang's own way; ipc: each trainer rank"
        " shares its GPU's memory with the engine rank there; shm: host memory shared on one machine; disk: a folder; auto: ipc"
        " where co-located, broadcast with rollout.endpoints, else stream",
        choices=("auto", "stream", "broadcast", "ipc", "shm", "disk"),
    )
    dir: str | None = option(None, "transport disk: a folder that trainers and engines see under this path; none: RUN_DIR/sync")
    bucket_bytes: int = option(512 * 2**20, "bytes a request; small tensors are flattened together", minimum=1, maximum=2**40)
    flatten_below_bytes: int = option(16 * 2**20, "tensors smaller than this travel flattened", minimum=0, maximum=2**40)
    timeout_s: float = option(300.0, "limit of one request or broadcast", minimum=1)
    canary_first: int = option(3, "verify after each of the first N syncs", minimum=0)
    canary_every: int = option(10, "then after every N-th; 0: never", minimum=0)
    canary_tolerance: float | None = option(
        None,
        "mean |log-prob| difference beyond which tensors are compared; none: 1e-3 in fp32, 0.1 in bf16, 0.75 in fp8",
        minimum=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Saving for resume."""

    every: int = option(0, "steps between checkpoints; 0: only at the end", minimum=0)
    keep: int = option(2, "whole checkpoints kept", minimum=1)
    at_end: bool = option(True, "save after the last step")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerConfig:
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = option(False, "write TensorBoard events to RUN_DIR/tensorboard")
    wandb_project: str | None = option(None, "report to this Weights & Biases project")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree, as written in YAML."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = field(default_factory=RewardConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    @property
    def transport(self) -> str:
        """``sync.transport`` with auto resolved."""
        if self.sync.transport != "auto":
            return self.sync.transport
        if self.cluster.colocated:
            return "ipc"
        return "broadcast" if self.rollout.endpoints else "stream"

    @property
    def engine_precision(self) -> Precision:
        """That of engines: ``rollout.dtype`` with auto resolved."""
        dtype = self.model.dtype if self.rollout.dtype == "auto" else self.rollout.dtype
        found = precision_of(dtype, fp32_head=self.model.fp32_head)
        return in_fp8(found) if self.rollout.fp8 else found

    @property
    def num_trainer_ranks(self) -> int:
        if self.cluster.num_trainer_ranks is not None:
            return self.cluster.num_trainer_ranks
        return self.parallel.tp * self.parallel.pp * self.parallel.cp

    @property
    def command(self) -> str:
        """The command of ``rlx`` that runs this."""
        return "eval" if self.evaluation.only else self.finetune.command

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are. An evaluation alone has a folder of its own below the run's."""
        run_dir = Path(self.run.dir)
        return (run_dir.parent if self.evaluation.only else run_dir) / "checkpoints"

    @property
    def examples_path(self) -> str:
        """``data.train`` of a fine-tuning run, which its checks ask for."""
        assert self.data.train is not None, "checked before anything starts"
        return self.data.train

    @property
    def is_finetuning(self) -> bool:
        """Whether the run learns from given answers, without engines and rewards."""
        return self.finetune.objective != "none"

    @property
    def starts_engines(self) -> bool:
        return not (self.is_finetuning or self.rollout.endpoints or self.rollout.replay)

    @property
    def trains_critic(self) -> bool:
        """Whether a second model is trained beside the policy."""
        return not self.is_finetuning and not self.evaluation.only and self.algorithm.needs_critic

    @property
    def has_reference(self) -> bool:
        if self.evaluation.only and not self.is_finetuning:
            return False
        return self.finetune.objective in WITH_REFERENCE if self.is_finetuning else self.algorithm.needs_reference
