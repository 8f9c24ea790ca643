"""``rlx reward try CONFIG``: the run's reward on the first rows of its prompts, without a model.

Prints one JSON line a verdict: reward (null where it is invalid), parts, valid, error. The answer to a row is a line of
--answers, else the row's own label, so that one sees a right answer earn what it should. It is tokenised and judged as in the
run: by the same processes, within the same limits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from rlx.cluster.checks.function_trial import trial_problems
from rlx.config.load import ConfigError, load_config
from rlx.config.options import positive
from rlx.config.schema import Config
from rlx.data.images.reader import ImageReader, image_reader
from rlx.data.prompts import PromptFiles
from rlx.data.rows import read_rows
from rlx.data.tokenizer import answer_decoder, encode_part, tokenizer_of
from rlx.rewards.base import check_prompt
from rlx.rewards.pool.pools import make_reward_service
from rlx.rewards.pool.service import AllVerdictsInvalidError
from rlx.rewards.registry import make_verifier, user_functions
from rlx.types.rollout import Prompt, Reward, RolloutGroup, Trajectory, given, sampled

DEFAULT_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    trying = actions.add_parser("try", help="judge given answers to the first rows", description=__doc__)
    trying.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    trying.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    trying.add_argument(
        "--answers", type=Path, metavar="FILE", help='JSONL of {"response": ...}, one a row in order; left out: the labels'
    )
    trying.add_argument("--rows", type=positive, metavar="N", help=f"rows to judge; left out: all answers, or {DEFAULT_ROWS}")
    trying.add_argument("--source", metavar="NAME", help="one of data.sources or evaluation.sets; left out: each of data.sources")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 all verdicts are valid, 1 some are not, 2 wrong configuration or answers."""
    config = load_config(args.config, args.overrides)
    if config.is_finetuning:
        raise ConfigError([f"finetune.objective: {config.finetune.objective} has no reward to try"])
    with TemporaryDirectory(prefix="rlx-images-") as images:
        return _tried(config, args, Path(images))


def _tried(config: Config, args: argparse.Namespace, folder: Path) -> int:
    """As ``main``, with a folder for the images of rows."""
    try:
        problems = list(trial_problems(("reward.name", name) for name in user_functions(config.reward)))
        if problems:
            raise ConfigError(problems)
        tokenizer = tokenizer_of(config.model, config.data)
        images = image_reader(config.model.path, config.data, tokenizer, folder)
        groups = _answered(config, tokenizer, images, args)
        skips, stops = config.reward.skip_special_tokens, config.rollout.stop_token_ids
        decode = answer_decoder(tokenizer, config.model.path, stops, skip_special_tokens=skips)
        service = make_reward_service(config.reward, decode)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    num_valid = 0
    try:
        for group in service.score(groups):
            (reward,) = group.rewards or ()
            num_valid += reward.valid
            print(_line(reward), flush=True)
    except AllVerdictsInvalidError:
        pass  # their lines are out
    finally:
        service.close()
    print(f"rlx: {len(groups)} verdicts, {len(groups) - num_valid} invalid", file=sys.stderr)
    return int(num_valid < len(groups))


def _answered(
    config: Config, tokenizer: PreTrainedTokenizerBase, images: ImageReader | None, args: argparse.Namespace
) -> list[RolloutGroup]:
    answers = None if args.answers is None else list(_read_answers(args.answers))
    if answers == []:
        raise ValueError(f"--answers: {args.answers} holds no rows")
    if answers is not None and args.source is None and len(config.data.by_name) > 1:
        raise ValueError(f"--answers belong to one source: name it by --source ({', '.join(config.data.by_name)})")
    num = args.rows or (DEFAULT_ROWS if answers is None else len(answers))
    seed = config.run.seed
    files = PromptFiles(data=config.data, evaluation=config.evaluation, tokenizer=tokenizer, seed=seed, images=images)
    prompts = files.first(args.source, num)
    verifier = make_verifier(config.reward)
    for prompt in prompts:
        check_prompt(verifier, prompt)
    texts = [_label_text(prompt) for prompt in prompts] if answers is None else answers[:num]
    if len(texts) > len(prompts):
        raise ValueError(f"--answers: {args.answers} has {len(answers or ())} answers, but there are {len(prompts)} prompts")
    return [
        RolloutGroup(prompt=prompt, trajectories=(_answered_by(prompt, encode_part(text, tokenizer)),))
        for prompt, text in zip(prompts, texts, strict=False)
    ]


def _read_answers(file: Path) -> Iterator[str]:
    for where, row in read_rows(str(file)):
        response = row.get("response")
        if not isinstance(response, str):
            raise ValueError(f'--answers: {where}: expected {{"response": TEXT}}')
        yield response


def _label_text(prompt: Prompt) -> str:
    if prompt.label is None:
        return ""
    return prompt.label if isinstance(prompt.label, str) else json.dumps(prompt.label, default=str)


def _answered_by(prompt: Prompt, token_ids: Sequence[int]) -> Trajectory:
    answer = sampled(token_ids, (0.0,) * len(token_ids), (0,) * len(token_ids))
    return Trajectory(segments=(given(prompt.token_ids), *answer), finish_reason="stop")


def _line(reward: Reward) -> str:
    value = reward.value if reward.valid else None
    return json.dumps({"reward": value, "parts": dict(reward.parts), "valid": reward.valid, "error": reward.error})
