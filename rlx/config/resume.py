"""What becomes of a key that has another value when a run goes on than when its checkpoint was saved: one row a key.

A key takes effect from the next step on, is refused by name (the checkpoint or the place in the data cannot follow it), is judged
by what it names (a folder may move; other weights or rows are refused where they are read), or is irrelevant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.arch.fields import words
from rlx.config.algorithm import WITH_CRITIC
from rlx.config.checks.unused import is_unused
from rlx.config.convert import Entry, all_entries, row_class, section_entries, to_tree
from rlx.config.schema import Config

TAKES_EFFECT, REFUSED, BY_CONTENT, IRRELEVANT = "takes effect", "refused", "judged by content", "irrelevant"

_RATES = "lr min_lr warmup_steps decay_steps schedule vision_lr_scale weight_decay beta1 beta2 eps clip_grad distributed offload"
_COLUMNS = "path args prompt_key messages_key tools_key label_key system_prompt"
# By section, the keys that a run follows from its next step on.
_FOLLOWED: Mapping[str, str] = {
    "run": "steps max_empty_steps export_hf failure_timeout_s",
    "cluster": "launcher device num_trainer_ranks nodes rollout_nodes colocated offload threads_per_rank ray_address ray_wait_s",
    "model": "reference_path fp32_head recompute recompute_layers moe_aux_loss_coefficient moe_z_loss_coefficient",
    "parallel": "tp pp vpp cp ep etp sequence_parallel",
    "data": "prompts_per_step label_key template_date",
    "data.sources.NAME": "label_key",
    "rollout": """engine num_engines tp python endpoints dtype fp8 samples_per_prompt max_new_tokens temperature top_p top_k
        stop_token_ids max_concurrent_requests request_timeout_s max_retries start_timeout_s release max_restarts record replay
        server_args""",
    "reward": "name args num_workers timeout_s memory_mb skip_special_tokens max_abs",
    "algorithm": """loss advantages epochs num_mini_batches gamma lam clip_low clip_high dual_clip value_clip
        loss_aggregation loss_constant
        whiten_advantages normalize_by_std entropy_coefficient kl_placement kl_estimator kl_controller kl_target kl_horizon
        dynamic_sampling dynamic_max_factor overlong_filter overlong_buffer overlong_penalty max_staleness
        mismatch_correction mismatch_high
        mismatch_low mismatch_reject_low mismatch_reject_high prime_beta""",
    "finetune": "epochs examples_per_step turns beta label_smoothing center_coefficient",
    "optimizer": _RATES,
    "critic_optimizer": _RATES,
    "batching": "max_tokens_per_micro_batch max_patches_per_micro_batch pad_to_multiple_of",
    "sync": "transport dir bucket_bytes flatten_below_bytes timeout_s canary_first canary_every canary_tolerance",
    "checkpoint": "every keep at_end",
    "evaluation": "data sets at_start every max_prompts samples_per_prompt temperature pass_reward",
    "evaluation.sets.NAME": f"{_COLUMNS} max_prompts samples_per_prompt temperature",
    "tracker": "tensorboard wandb_project",
}
_ORDER = "the order of the data follows from it, and the run is in the middle of that"
_OTHER_TEXT = "the prompts (or examples) would be others"
_ANOTHER_CRITIC = "it trains a critic of a kind that the checkpoint does not hold"
_STEERED = "the adaptive controller goes on from the coefficient that it has reached"
# Why a run cannot follow these.
_REFUSED: Mapping[str, str] = {
    "run.seed": "the order of the data and the draws of answers follow from it",
    "model.dtype": "the checkpoint holds weights and optimizer state of the other type",
    "model.layer_spec": "the checkpoint holds the tensors as the other layers keep them",
    "model.vision": "the checkpoint holds the optimizer state of what learnt, and of nothing else",
    "data.sources": _ORDER,
    "data.shuffle": _ORDER,
    "data.curriculum_key": _ORDER,
    "data.curriculum_epochs": _ORDER,
    "data.sources.NAME.weight": _ORDER,
    "data.sources.NAME.curriculum_key": _ORDER,
    "data.prompt_key": _OTHER_TEXT,
    "data.messages_key": _OTHER_TEXT,
    "data.tools_key": _OTHER_TEXT,
    "data.system_prompt": _OTHER_TEXT,
    "data.images_key": _OTHER_TEXT,
    "data.min_pixels": "the images would be of other sizes",
    "data.max_pixels": "the images would be of other sizes",
    "data.sources.NAME.prompt_key": _OTHER_TEXT,
    "data.sources.NAME.messages_key": _OTHER_TEXT,
    "data.sources.NAME.tools_key": _OTHER_TEXT,
    "data.sources.NAME.system_prompt": _OTHER_TEXT,
    "finetune.response_key": _OTHER_TEXT,
    "finetune.chosen_key": _OTHER_TEXT,
    "finetune.rejected_key": _OTHER_TEXT,
    "finetune.objective": "the checkpoint is of a model that learns something else",
    "algorithm.name": _ANOTHER_CRITIC,
    "algorithm.kl_coefficient": _STEERED,
}
# What they name, or leave of it, is compared where it is read.
_BY_CONTENT = words(
    """
    model.path model.critic_path model.tokenizer_path data.train data.chat_template data.max_prompt_tokens data.overlong
    data.bad_images data.sources.NAME.path data.sources.NAME.args finetune.max_tokens finetune.overlong
    """
)
_IRRELEVANT = words(
    "run.dir run.resume run.overwrite evaluation.only cluster.gpus_per_node cluster.nvlink_gpus cluster.gpu_memory_gib"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key with another value than in the checkpoint; ``why`` a run cannot follow it ("" where it can)."""

    key: str
    was: Any
    now: Any
    effect: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.was)} -> {_show(self.now)}"


def effect_of(key: str) -> str:
    """The class of a key (``data.sources.NAME.weight`` for one of a row); KeyError for one that the table does not have."""
    section, _, name = key.rpartition(".")
    if key in _REFUSED:
        return REFUSED
    if key in _BY_CONTENT:
        return BY_CONTENT
    if key in _IRRELEVANT:
        return IRRELEVANT
    if name in _FOLLOWED.get(section, "").split():
        return TAKES_EFFECT
    raise KeyError(f"{key} has no class in {__name__}: say what becomes of it when a run goes on")


def compare(saved: Mapping[str, Any], config: Config) -> list[Change]:
    """The keys that matter to this run and differ from ``saved``, the tree of its checkpoint (a key that it lacks had its
    default), in the order of the schema."""
    before, now = _values(saved), _values(json.loads(json.dumps(to_tree(config))))
    found = []
    for key in [key for key in now if key in before and now[key] != before[key] and _matters(key, config)]:
        found.append(_judged(Change(key=key, was=before[key], now=now[key], effect=effect_of(_pattern(key))), before, config))
    return [change for change in found if change.effect != IRRELEVANT]


def refusal(change: Change, where: str) -> str:
    """The error for a key that cannot be followed; ``where`` names the checkpoint."""
    return (
        f"{change.key}: {_show(change.now)}, but {_show(change.was)} in {where}: {change.why};"
        f" set it back, or begin a new run in another run.dir"
    )


def _judged(change: Change, before: Mapping[str, Any], config: Config) -> Change:
    """With the class that its two values give it."""
    effect = change.effect
    if change.key == "algorithm.name" and (change.now not in WITH_CRITIC or change.now == change.was):
        effect = TAKES_EFFECT
    if change.key == "algorithm.kl_coefficient" and "fixed" in (
        before["algorithm.kl_controller"],
        config.algorithm.kl_controller,
    ):
        effect = TAKES_EFFECT
    why = _REFUSED[_pattern(change.key)] if effect == REFUSED else ""
    return Change(key=change.key, was=change.was, now=change.now, effect=effect, why=why)


def _matters(key: str, config: Config) -> bool:
    return key == "finetune.objective" or not is_unused(key, config)


def _values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Key to value, rows spelt out; of a mapping by free names its names."""
    found: dict[str, Any] = {}
    for entry in all_entries():
        if entry.is_section:
            continue
        section = entry.key.rpartition(".")[0]
        value = _value(entry, tree.get(section, {}))
        row = row_class(entry.hint)
        found[entry.key] = value if row is None else list(value)
        for title, fields in value.items() if row else ():
            found |= {below.key: _value(below, fields) for below in section_entries(row, f"{entry.key}.{title}.")}
    return found


def _value(entry: Entry, section: Mapping[str, Any]) -> Any:
    if entry.field.name in section:
        return section[entry.field.name]
    return None if entry.is_required else json.loads(json.dumps(entry.default()))


def _pattern(key: str) -> str:
    """The table's key of a key: rows are called NAME there."""
    parts = key.split(".")
    return ".".join([*parts[:2], "NAME", *parts[3:]]) if len(parts) > 3 else key


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
