"""What no single key can say: whether the keys fit together, and whether the files they name are there.

Every message names the keys it is about and what would be right. Files are looked at, never loaded; no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import date

from rlx.arch.architecture import Architecture
from rlx.arch.engine_format import fp8_problems
from rlx.arch.families.registry import read_architecture
from rlx.arch.layout import layout_problems
from rlx.config.algorithm import GROUP_ADVANTAGES, KL_IN_REWARD, NEEDS_GROUPS
from rlx.config.checks.urls import is_url
from rlx.config.finetune import WITH_REFERENCE
from rlx.config.schema import Config
from rlx.config.sources import SOURCE_NAME, files_of, task_of
from rlx.config.user_function import form_problem


def check(config: Config, *, on_paper: bool = False) -> list[str]:
    """Every cross-field problem, one line each; empty when the configuration can be started. ``on_paper``: the files
    of prompts and rewards need not be here."""
    if config.is_finetuning:
        own = (_finetuning, _evaluation) if on_paper else (_data, _finetuning, _evaluation)
    else:
        own = (*(() if on_paper else (_data, _replay, _reward)), _rollout, _fp8, _algorithm, _evaluation, _colocation)
    groups = (_layout, _models, *own, _optimizers, _device, *(() if on_paper else (_outputs,)))
    return [message for group in groups for message in group(config)]


def _outputs(config: Config) -> Iterator[str]:
    """Whether there can be files of these names: no loop of links, no file as a folder, no name too long."""
    if config.run.overwrite and config.run.resume == "auto":
        yield "run.overwrite: true removes what run.resume=auto would go on from; choose one"
    if os.path.isfile(config.run.dir):
        yield f"run.dir: {config.run.dir} is a file; name a folder"
    for key, path in (("run.dir", config.run.dir), ("sync.dir", config.sync.dir), ("rollout.record", config.rollout.record)):
        if path and path.startswith("~"):
            yield f"{key}: {path!r:.200} would be a folder called ~ here: neither a shell nor rlx puts your home in its place"
        try:
            os.stat(path or ".")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            yield f"{key}: {path!r:.200} cannot be used: {error.strerror if isinstance(error, OSError) else error}"


def _layout(config: Config) -> Iterator[str]:
    try:
        config.parallel.dims(config.num_trainer_ranks)
    except ValueError as error:
        yield from str(error).split("; ")
    model = config.model
    if model.recompute_layers is not None and model.recompute != "full":
        yield (
            f"model.recompute_layers: {model.recompute_layers} says how many layers model.recompute=full takes, but"
            f" model.recompute is {model.recompute}; set it to full"
        )


def _models(config: Config) -> Iterator[str]:
    named = {
        "model.path": config.model.path,
        "model.reference_path": config.model.reference_path,
        "model.critic_path": config.model.critic_path,
    }
    read: dict[str, Architecture] = {}
    for key, folder in named.items():
        if folder is not None:
            try:
                read[key] = read_architecture(folder)
            except ValueError as error:
                yield f"{key}: {error}"
    policy = read.pop("model.path", None)
    if policy is not None:
        for key, other in read.items():
            if other.shape != policy.shape:
                yield f"{key}: its config.json differs in shape from that of model.path; all roles share one architecture"
        yield from _model_fits(config, policy)
    if config.model.tokenizer_path is not None and not os.path.isdir(config.model.tokenizer_path):
        yield f"model.tokenizer_path: no such folder {config.model.tokenizer_path}"


def _model_fits(config: Config, arch: Architecture) -> Iterator[str]:
    with suppress(ValueError):  # a layout that is wrong in itself has its own messages
        dims = config.parallel.dims(config.num_trainer_ranks)
        yield from (f"parallel.{dimension}: {problem}" for dimension, problem in layout_problems(arch, dims))
    if config.is_finetuning:
        if config.finetune.max_tokens > arch.max_positions:
            yield (
                f"finetune.max_tokens: {config.finetune.max_tokens} exceeds the {arch.max_positions} positions"
                " (max_position_embeddings) of model.path"
            )
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    whole = f"{config.data.max_prompt_tokens} + {config.rollout.max_new_tokens} = {longest}"
    if longest > arch.max_positions:
        yield (
            f"data.max_prompt_tokens + rollout.max_new_tokens: {whole} exceeds the {arch.max_positions} positions"
            " (max_position_embeddings) of model.path"
        )
    if config.starts_engines and config.rollout.engine == "sglang" and arch.num_heads % config.rollout.tp:
        yield f"rollout.tp: {config.rollout.tp} does not divide the {arch.num_heads} attention heads of model.path"
    if config.rollout.fp8 and config.starts_engines:
        yield from (f"rollout.fp8: {problem}" for problem in fp8_problems(arch, config.rollout.tp))
    outside = [token for token in config.rollout.stop_token_ids if not 0 <= token < arch.vocab_size]
    if outside:
        yield f"rollout.stop_token_ids: {outside[0]} is outside the vocabulary of {arch.vocab_size} of model.path"


def _data(config: Config) -> Iterator[str]:
    if config.data.train is None and not config.data.sources and not config.evaluation.only:
        yield "data.train: required unless data.sources names some (prompts to train on)"
    if config.data.train is not None and config.data.sources:
        yield "data.sources: they stand in for data.train, so leave one of the two out"
    named = {"data.train": config.data.train, "evaluation.data": config.evaluation.data}
    for section, rows in (("data.sources", config.data.sources), ("evaluation.sets", config.evaluation.sets)):
        named |= {f"{section}.{name}.path": row.path for name, row in rows.items()}
        for name in rows:
            if not SOURCE_NAME.fullmatch(name):
                yield f"{section}: the name {name!r} may hold letters, digits, - and _ alone"
    for key, path in named.items():
        if path is not None:
            yield from _data_file(key, path)
    template = config.data.chat_template
    if template is not None and not os.path.isfile(template):
        yield f"data.chat_template: no such file {template}"
    day = config.data.template_date
    if day is not None and not _is_day(day):
        yield f"data.template_date: {day!r} is no day such as 2025-01-31"


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _data_file(key: str, path: str) -> Iterator[str]:
    if task_of(path) is not None:
        return  # whether there is such a task is asked of what makes it
    try:
        files_of(path)
    except (ValueError, OSError) as error:
        yield f"{key}: {error}"


def _fp8(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not rollout.fp8 or rollout.replay is not None:
        return
    if rollout.endpoints:
        yield "rollout.fp8: engines start from a folder that rlx makes; leave rollout.endpoints empty or set it to false"
    elif rollout.engine != "sglang":
        yield "rollout.fp8: the embedded engine has no FP8; use rollout.engine=sglang or set it to false"
    if config.engine_precision.name != "bf16":
        yield f"rollout.fp8: engines compute in bf16 beside it, but rollout.dtype is {config.engine_precision.name}; use bf16"
    if config.cluster.device == "cpu":
        yield "rollout.fp8: needs GPUs, but cluster.device is cpu; set it to false"


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    off = "; anything else makes the engine's log-probs differ from the trainer's"
    trains = not config.evaluation.only
    if rollout.top_p != 1.0 and trains:
        yield f"rollout.top_p: {rollout.top_p:g} must be 1 in training{off}"
    if rollout.top_k != -1 and trains:
        yield f"rollout.top_k: {rollout.top_k} must be -1 (off) in training{off}"
    if rollout.temperature == 0 and trains:
        yield "rollout.temperature: 0 (greedy) cannot train, every answer to a prompt would be the same; use 1"
    if rollout.python is not None and not (os.path.isfile(rollout.python) and os.access(rollout.python, os.X_OK)):
        yield f"rollout.python: {rollout.python} is no program; name the interpreter of an environment that holds sglang"
    for url in rollout.endpoints:
        if not is_url(url):
            yield f"rollout.endpoints: {url!r} must be a URL such as http://host:30000"
    longest, budget = config.data.max_prompt_tokens + rollout.max_new_tokens, config.batching.max_tokens_per_micro_batch
    if longest > budget and not config.evaluation.only:
        yield (
            f"batching.max_tokens_per_micro_batch: {budget} does not hold one sample of data.max_prompt_tokens +"
            f" rollout.max_new_tokens = {config.data.max_prompt_tokens} + {rollout.max_new_tokens} = {longest} tokens"
        )
    samples = config.data.prompts_per_step * rollout.samples_per_prompt
    if samples < config.algorithm.num_mini_batches:
        yield (
            f"algorithm.num_mini_batches: {config.algorithm.num_mini_batches} needs at least as many samples, but"
            f" data.prompts_per_step x rollout.samples_per_prompt is {samples}"
        )


def _replay(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.replay is None:
        return
    if config.evaluation.only:
        yield "rollout.replay: rlx eval asks engines; leave it out"
    if not os.path.isfile(rollout.replay):
        yield f"rollout.replay: no such file {rollout.replay}; rollout.record writes one"
    if rollout.endpoints:
        yield "rollout.replay: no engine is asked when replaying; leave rollout.endpoints empty or rollout.replay out"
    if rollout.record is not None and os.path.realpath(rollout.record) == os.path.realpath(rollout.replay):
        yield f"rollout.record: {rollout.record} is also rollout.replay and would be overwritten; name another file"


def _reward(config: Config) -> Iterator[str]:
    if not config.reward.name:
        yield "reward.name: required but missing (a verifier of docs/rewards.md, or path/to/file.py:function)"
    if problem := form_problem("reward.name", config.reward.name):
        yield problem


def _algorithm(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    for key, name in (("algorithm.loss", algorithm.loss), ("algorithm.advantages", algorithm.advantages)):
        if problem := form_problem(key, name or ""):
            yield problem
    if algorithm.advantages is not None and algorithm.name not in GROUP_ADVANTAGES:
        yield (
            f"algorithm.advantages: algorithm.name {algorithm.name} has no advantages of groups to replace;"
            f" use one of {', '.join(GROUP_ADVANTAGES)}"
        )
    if algorithm.name in NEEDS_GROUPS and config.rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt: algorithm.name {algorithm.name} compares answers to one prompt"
            " and needs at least 2, got 1"
        )
    if algorithm.dynamic_sampling and config.rollout.samples_per_prompt < 2:
        yield "algorithm.dynamic_sampling: needs rollout.samples_per_prompt of at least 2, got 1; set it to false"
    if algorithm.kl_placement == "reward" and algorithm.name not in KL_IN_REWARD:
        yield (
            f"algorithm.kl_placement: reward works with algorithm.name {', '.join(KL_IN_REWARD)}; use loss with {algorithm.name}"
        )
    if algorithm.kl_controller == "adaptive" and algorithm.kl_placement != "reward":
        yield f"algorithm.kl_controller: adaptive needs algorithm.kl_placement reward, got {algorithm.kl_placement}"
    if algorithm.kl_controller == "adaptive" and algorithm.kl_target <= 0:
        yield "algorithm.kl_target: must be above 0 with algorithm.kl_controller adaptive"
    if algorithm.kl_placement != "none" and algorithm.kl_coefficient <= 0:
        yield (
            f"algorithm.kl_coefficient: must be above 0 with algorithm.kl_placement {algorithm.kl_placement};"
            " set one, or the placement to none"
        )
    if algorithm.mismatch_low > algorithm.mismatch_high:
        yield f"algorithm.mismatch_low: {algorithm.mismatch_low:g} exceeds algorithm.mismatch_high {algorithm.mismatch_high:g}"
    if algorithm.name == "prime" and algorithm.prime_beta <= 0:
        yield "algorithm.prime_beta: must be above 0 with algorithm.name prime"


def _finetuning(config: Config) -> Iterator[str]:
    finetune, parallel = config.finetune, config.parallel
    if config.data.sources:
        yield "data.sources: fine-tuning takes its examples from one file, data.train"
    if config.evaluation.sets:
        yield "evaluation.sets: fine-tuning has one held-out file, evaluation.data"
    multiple = 2 * parallel.cp if parallel.cp > 1 else 1
    sides = 2 if finetune.is_paired else 1
    needed = sides * -(-finetune.max_tokens // multiple) * multiple
    if needed > config.batching.max_tokens_per_micro_batch:
        what = "both sides of a pair" if finetune.is_paired else "one example"
        yield (
            f"batching.max_tokens_per_micro_batch: {config.batching.max_tokens_per_micro_batch} does not hold {what} of"
            f" finetune.max_tokens = {finetune.max_tokens}; it takes {needed}"
        )
    if finetune.objective in WITH_REFERENCE and finetune.beta == 0:
        yield f"finetune.beta: must be above 0 with finetune.objective {finetune.objective}"
    if config.cluster.rollout_nodes:
        yield f"cluster.rollout_nodes: {config.cluster.rollout_nodes}, but fine-tuning starts no engines; set it to 0"


def _evaluation(config: Config) -> Iterator[str]:
    for key in ("only", "at_start"):
        if getattr(config.evaluation, key) and not config.evaluation.by_name:
            yield f"evaluation.{key}: there is nothing to evaluate on; name evaluation.data or evaluation.sets"
            return
    for name, one in config.evaluation.by_name.items():
        if one.temperature == 0 and (one.samples_per_prompt or 1) > 1:
            section = f"evaluation.sets.{name}" if name else "evaluation"
            yield (
                f"{section}.temperature: 0 (greedy) gives evaluation's samples_per_prompt = {one.samples_per_prompt}"
                " equal answers; set a temperature"
            )


def _optimizers(config: Config) -> Iterator[str]:
    for section, optimizer in (("optimizer", config.optimizer), ("critic_optimizer", config.critic_optimizer)):
        if optimizer.min_lr > optimizer.lr:
            yield f"{section}.min_lr: {optimizer.min_lr:g} must not exceed {section}.lr, which is {optimizer.lr:g}"
        if optimizer.offload and not optimizer.distributed:
            yield f"{section}.offload: needs {section}.distributed, which is false; set it to true, on one rank too"
        if optimizer.decay_steps is not None and optimizer.warmup_steps >= optimizer.decay_steps:
            yield (
                f"{section}.warmup_steps: {optimizer.warmup_steps} must be below {section}.decay_steps, which is"
                f" {optimizer.decay_steps} and counts them in"
            )


def _device(config: Config) -> Iterator[str]:
    address = config.cluster.ray_address or ""
    if "://" in address or (address not in ("", "auto", "local") and not address.rpartition(":")[2].isdecimal()):
        yield f"cluster.ray_address: {address} is no HOST:PORT; run this on a node of the cluster (its port is 6379 by default)"
    if config.model.layer_spec == "transformer_engine" and config.cluster.device == "cpu":
        yield "model.layer_spec: transformer_engine needs GPUs, but cluster.device is cpu; use auto or torch"
    elif config.model.layer_spec == "transformer_engine" and config.model.dtype != "bf16":
        yield f"model.layer_spec: transformer_engine needs model.dtype bf16, got {config.model.dtype}; use auto or torch"


def _colocation(config: Config) -> Iterator[str]:
    cluster, rollout = config.cluster, config.rollout
    own = not (rollout.endpoints or rollout.replay)
    if config.transport in ("ipc", "shm") and rollout.endpoints:
        yield f"sync.transport: {config.transport} needs engines that rlx starts; use broadcast or disk with rollout.endpoints"
    if config.transport == "ipc" and not cluster.colocated and cluster.device != "cpu":
        yield "sync.transport: ipc needs engines on the trainers' GPUs: set cluster.colocated=true, or use broadcast"
    several = max(cluster.nodes or 1, cluster.rollout_nodes + 1) > 1
    is_local = config.transport == "ipc" and cluster.colocated and cluster.gpus_per_node is not None
    if several and config.transport in ("ipc", "shm") and not is_local:
        remedy = "; ipc does where cluster.colocated and cluster.gpus_per_node are given" if config.transport == "ipc" else ""
        yield (
            f"sync.transport: {config.transport} joins processes of one machine, cluster.nodes and rollout_nodes ask for"
            f" more{remedy}"
        )
    if config.transport in ("stream", "broadcast") and cluster.colocated and cluster.device != "cpu":
        yield f"sync.transport: {config.transport} cannot join two processes on one GPU; use ipc or disk with cluster.colocated"
    if config.sync.dir is not None and config.transport != "disk":
        yield f"sync.dir: only sync.transport=disk writes there, this run's is {config.transport}; leave it out or set disk"
    if not cluster.colocated:
        for key, value in (("cluster.offload", cluster.offload), ("rollout.release", rollout.release)):
            if value not in ("auto", "none"):
                yield f"{key}: {value} needs cluster.colocated=true"
        return
    if not own:
        yield "cluster.colocated: needs engines that rlx starts; leave rollout.endpoints and rollout.replay empty"
    if cluster.launcher == "ray":
        yield "cluster.colocated: the ray launcher gives engines GPUs of their own; use cluster.launcher=local or torchrun"
    if cluster.rollout_nodes:
        yield f"cluster.colocated: contradicts cluster.rollout_nodes {cluster.rollout_nodes}, nodes for engines alone"
    if rollout.num_engines * rollout.tp > config.num_trainer_ranks:
        yield (
            f"cluster.colocated: rollout.num_engines x rollout.tp = {rollout.num_engines} x {rollout.tp} GPUs, but there are"
            f" {config.num_trainer_ranks} trainer rank(s); each engine GPU is a trainer rank's"
        )
