"""Keys that are set and change nothing, because of the command or of another key.

Said and not refused: one file may serve several commands, and what one of them uses the next one does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

from rlx.arch.architecture import Architecture
from rlx.config.algorithm import AlgorithmConfig
from rlx.config.convert import all_entries
from rlx.config.schema import Config, DataConfig, ModelConfig

WITH_DISCOUNT = ("ppo", "reinforce_pp", "prime")
WITH_STD = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp_baseline")
WITHOUT_DUAL_CLIP = ("gspo", "cispo")
REMOTE_REWARDS = ("http", "model", "judge")


@dataclass(frozen=True, slots=True)
class Rule:
    """``keys`` (of one section, or a whole one) that change nothing where ``applies``, and why; ``{}`` in the reason stands for
    the command's name."""

    keys: str
    applies: Callable[[Config], bool]
    why: str

    def names(self) -> Iterator[str]:
        section, _, names = self.keys.partition(".")
        yield from (f"{section}.{name}" for name in names.split())


def _always(config: Config) -> bool:
    return True


def _schedule(section: str) -> Rule:
    return Rule(
        f"{section}.min_lr decay_steps",
        lambda config: getattr(config, section).schedule == "constant",
        f"{section}.schedule is constant",
    )


_FINETUNING = (
    Rule("run.max_empty_steps", _always, "rlx {} learns from every batch"),
    Rule("data.prompts_per_step", _always, "rlx {} takes finetune.examples_per_step"),
    Rule("data.max_prompt_tokens", _always, "rlx {} limits whole sequences, by finetune.max_tokens"),
    Rule("data.overlong", _always, "rlx {} takes finetune.overlong"),
    Rule("data.system_prompt label_key curriculum_key curriculum_epochs", _always, "rlx {} learns rows as they are"),
    Rule("evaluation.samples_per_prompt temperature pass_reward", _always, "rlx {} evaluates the loss"),
    Rule("cluster.colocated offload", _always, "rlx {} starts no engines"),
    *(
        Rule(f"{section}.*", _always, "not used by rlx {}")
        for section in ("rollout", "reward", "algorithm", "sync", "critic_optimizer")
    ),
    Rule("finetune.turns", lambda config: config.finetune.is_paired, "pairs take the last turn"),
    Rule("finetune.response_key", lambda config: config.finetune.is_paired, "pairs have finetune.chosen_key and rejected_key"),
    Rule("finetune.chosen_key rejected_key", lambda config: not config.finetune.is_paired, "rlx {} has one answer a row"),
    Rule("finetune.beta", lambda config: not config.has_reference, "rlx {} has no reference"),
    Rule("finetune.label_smoothing", lambda config: config.finetune.objective != "dpo", "finetune.objective is not dpo"),
    Rule("finetune.center_coefficient", lambda config: config.finetune.objective != "rm", "finetune.objective is not rm"),
    Rule("model.critic_path", _always, "rlx {} has no critic"),
    Rule("run.steps", lambda config: config.finetune.epochs is not None, "finetune.epochs says how long rlx {} is"),
)
_REINFORCEMENT = (
    Rule("finetune.*", _always, "not used by rlx {}"),
    Rule(
        "data.curriculum_epochs",
        lambda config: config.data.curriculum_key is None and not any(one.curriculum_key for one in config.data.sources.values()),
        "there is no curriculum_key",
    ),
    Rule("critic_optimizer.*", lambda config: not config.trains_critic, "algorithm.name trains no critic"),
    Rule("model.critic_path", lambda config: not config.trains_critic, "algorithm.name trains no critic"),
    Rule("algorithm.gamma", lambda config: config.algorithm.name not in WITH_DISCOUNT, "algorithm.name discounts nothing"),
    Rule("algorithm.lam value_clip", lambda config: config.algorithm.name != "ppo", "algorithm.name is not ppo"),
    Rule("algorithm.prime_beta", lambda config: config.algorithm.name != "prime", "algorithm.name is not prime"),
    Rule("algorithm.normalize_by_std", lambda config: config.algorithm.name not in WITH_STD, "algorithm.name takes no deviation"),
    Rule("algorithm.dual_clip", lambda config: config.algorithm.name in WITHOUT_DUAL_CLIP, "algorithm.name clips in its own way"),
    Rule(
        "algorithm.loss_constant",
        lambda config: config.algorithm.loss_aggregation != "constant",
        "loss_aggregation is not constant",
    ),
    Rule("algorithm.kl_coefficient kl_estimator", lambda config: config.algorithm.kl_placement == "none", "kl_placement is none"),
    Rule("algorithm.kl_target kl_horizon", lambda config: config.algorithm.kl_controller != "adaptive", "kl_controller is fixed"),
    Rule("algorithm.dynamic_max_factor", lambda config: not config.algorithm.dynamic_sampling, "dynamic_sampling is false"),
    Rule("algorithm.overlong_penalty", lambda config: not config.algorithm.overlong_buffer, "overlong_buffer is 0"),
    Rule("algorithm.mismatch_high", lambda config: config.algorithm.mismatch_correction == "none", "mismatch_correction is none"),
    Rule(
        "algorithm.mismatch_low",
        lambda config: not config.algorithm.mismatch_correction.endswith("mask"),
        "mismatch_correction does not mask",
    ),
    Rule(
        "rollout.num_engines python server_args max_restarts",
        lambda config: not config.starts_engines,
        "no engines are started with rollout.endpoints or rollout.replay",
    ),
    Rule("rollout.python", lambda config: config.rollout.engine != "sglang", "rollout.engine is not sglang"),
    Rule(
        "rollout.tp",
        lambda config: config.rollout.engine != "sglang" and not config.cluster.colocated and not config.rollout.endpoints,
        "rollout.engine is not sglang",
    ),
    Rule(
        "rollout.engine dtype fp8 max_concurrent_requests request_timeout_s max_retries start_timeout_s",
        lambda config: config.rollout.replay is not None,
        "there are no engines with rollout.replay",
    ),
    Rule("reward.memory_mb", lambda config: config.reward.name in REMOTE_REWARDS, "what waits for a server takes no memory"),
    Rule("rollout.record", lambda config: config.rollout.replay is not None, "nothing is recorded while rollout.replay is read"),
    Rule(
        "sync.canary_tolerance",
        lambda config: config.sync.canary_first == config.sync.canary_every == 0,
        "no publication is verified with canary_first and canary_every 0",
    ),
    Rule("sync.*", lambda config: config.rollout.replay is not None, "there are no engines with rollout.replay"),
)
_ALWAYS = (
    Rule(
        "evaluation.every max_prompts samples_per_prompt temperature pass_reward",
        lambda config: not config.evaluation.by_name,
        "there is no evaluation.data",
    ),
    Rule("model.reference_path", lambda config: not config.has_reference, "there is no reference model"),
    Rule(
        "model.fp32_head",
        lambda config: config.model.dtype == config.engine_precision.name == "fp32",
        "everything is fp32 with model.dtype fp32",
    ),
    Rule("cluster.ray_address ray_wait_s", lambda config: config.cluster.launcher != "ray", "cluster.launcher is not ray"),
    Rule("cluster.nvlink_gpus", lambda config: config.cluster.gpus_per_node is None, "cluster.gpus_per_node is not given"),
    Rule(
        "optimizer.offload",
        lambda config: config.cluster.device == "cpu",
        "on CPUs the optimizer's state is in host memory anyway",
    ),
    Rule(
        "critic_optimizer.offload",
        lambda config: config.cluster.device == "cpu",
        "on CPUs the optimizer's state is in host memory anyway",
    ),
    _schedule("optimizer"),
    _schedule("critic_optimizer"),
    *(
        Rule(f"{section}.vision_lr_scale", lambda config: config.model.vision == "frozen", "model.vision is frozen")
        for section in ("optimizer", "critic_optimizer")
    ),
)
_OF_TOWERS = (
    "model.vision",
    "batching.max_patches_per_micro_batch",
    "optimizer.vision_lr_scale",
    "critic_optimizer.vision_lr_scale",
)


def is_unused(key: str, config: Config) -> bool:
    """Whether a key changes nothing, whatever the model is."""
    return any(rule.applies(config) and _covers(rule, key) for rule in _rules(config))


def schedule_warnings(config: Config) -> Iterator[str]:
    """Schedules that end before they begin, or long before the run does."""
    algorithm = config.algorithm
    total = config.run.steps * (1 if config.is_finetuning else algorithm.epochs * algorithm.num_mini_batches)
    sections = {"optimizer": config.optimizer, **({"critic_optimizer": config.critic_optimizer} if config.trains_critic else {})}
    for section, optimizer in sections.items():
        if optimizer.lr == 0:
            yield f"{section}.lr: 0: the run learns nothing"
        if optimizer.warmup_steps >= total:
            yield (
                f"{section}.warmup_steps: {optimizer.warmup_steps} steps of a run of {total} optimizer steps: the learning rate"
                f" does not reach {section}.lr before the end"
            )
        ends, falls = optimizer.decay_steps or total, optimizer.schedule != "constant" and optimizer.min_lr == 0
        if falls and ends < total:
            yield (
                f"{section}.decay_steps: the learning rate is {section}.min_lr = 0 from optimizer step {ends} on, of {total}:"
                " the rest of the run learns nothing"
            )


def unused_keys(config: Config, arch: Architecture) -> list[str]:
    """A line for each reason that keys of this configuration, of a model of ``arch``, change nothing. None for ``rlx eval``,
    which is given the configurations of other commands."""
    if config.evaluation.only:
        return []
    rules = _rules(config)
    if arch.experts is None:
        rules.append(Rule("model.moe_aux_loss_coefficient moe_z_loss_coefficient", _always, "model.path has no experts"))
        rules.append(Rule("parallel.etp", _always, "model.path has no experts"))
    if arch.vision is None:
        # First: that the tower is frozen is no reason where there is none.
        rules = [*(Rule(key, _always, "model.path has no vision tower") for key in _OF_TOWERS), *rules]
    lines, said = [], set[str]()
    changed = _changed(config)
    for rule in rules:
        if rule.applies(config):
            found = [key for key in changed if key not in said and _covers(rule, key)]
            said.update(found)
            if found:
                lines.append(f"{', '.join(found)}: changes nothing: {rule.why.format(config.command)}")
    return lines


def _rules(config: Config) -> list[Rule]:
    return [*(_FINETUNING if config.is_finetuning else _REINFORCEMENT), *_ALWAYS]


def _covers(rule: Rule, key: str) -> bool:
    return key.startswith(rule.keys[:-1]) if rule.keys.endswith(".*") else key in rule.names()


def _changed(config: Config) -> list[str]:
    """The keys whose values are not the defaults."""
    blank = Config(model=ModelConfig(path=""), data=DataConfig())
    usual = _leaves(replace(blank, algorithm=AlgorithmConfig(name=config.algorithm.name)))
    usual["algorithm.name"] = blank.algorithm.name
    return [key for key, value in _leaves(config).items() if value != usual[key]]


def _leaves(config: Config) -> dict[str, object]:
    keys = [entry.key for entry in all_entries() if not entry.is_section]
    return {key: reduce(getattr, key.split("."), config) for key in keys}
