"""The driver's part of reinforcement learning: wires the roles together and runs the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlx.algos.kl_controller import make_kl_controller
from rlx.algos.registry import make_algorithm
from rlx.arch.families.registry import read_architecture
from rlx.config.schema import Config
from rlx.data.prompts import PromptSource
from rlx.data.tokenizer import answer_decoder, tokenizer_of
from rlx.driver.batcher import Batcher, BatchRules
from rlx.driver.evaluate import Evaluation
from rlx.driver.groups import GroupStream
from rlx.driver.keeping import KeptModels, evaluate_alone
from rlx.driver.lane import CommandLane
from rlx.driver.ppo import Learner, PPOTrainer
from rlx.driver.publishing import EnginePublisher
from rlx.driver.ranks import (
    RankedCritic,
    RankedPolicy,
    RankedReference,
)
from rlx.driver.roles import RewardService, Roles, RolloutService
from rlx.driver.run import run
from rlx.engines.fleet import read_fleet
from rlx.obs.log import logger, phase
from rlx.rewards.pool.pools import make_reward_service
from rlx.rollout.generate import HttpRolloutService
from rlx.rollout.record import RolloutRecorder, RolloutReplay
from rlx.rollout.router import EngineCare
from rlx.trainer.commands import MemoryMetrics
from rlx.types.rollout import SamplingSpec


class Reinforcement:
    """Reinforcement learning as a job: the trainer's steps, evaluated on held-out prompts."""

    def __init__(self, trainer: PPOTrainer, evaluation: Evaluation, lane: CommandLane) -> None:
        self._trainer, self._evaluation, self._lane = trainer, evaluation, lane
        self.models: KeptModels = trainer.roles.policy
        self.begin, self.step = trainer.publish_start, trainer.step
        self.state, self.load_state = trainer.state, trainer.load_state

    @property
    def num_steps_done(self) -> int:
        return self._trainer.num_steps_done

    def evaluate(self, step: int) -> Mapping[str, float]:
        return self._evaluation.measure(step) if self._evaluation.sets else {}

    def counts(self) -> Mapping[str, float]:
        return {**self._trainer.roles.rollout.counts(), **self._lane.ask(MemoryMetrics())}


def drive(config: Config, lane: CommandLane, engines: Path, *, stop_asked: Callable[[], bool] = lambda: False) -> bool:
    """Train to the end; False when ``stop_asked`` ended it early."""
    with ExitStack() as stack:
        tokenizer = tokenizer_of(config)
        trainer = _make_trainer(config, lane, engines, tokenizer, stack)
        roles = trainer.roles
        evaluation = Evaluation(config, roles.rollout, roles.reward, sampling_of(config, tokenizer), tokenizer)
        return run(config, Reinforcement(trainer, evaluation, lane), stop_asked=stop_asked)


def drive_evaluation(config: Config, lane: CommandLane, engines: Path) -> None:
    """Publish the weights to the engines and evaluate them there."""
    with ExitStack() as stack:
        tokenizer = tokenizer_of(config)
        publisher, rollout, reward = _make_services(config, lane, engines, tokenizer, stack)
        policy = RankedPolicy(lane, publisher, config)
        evaluation = Evaluation(config, rollout, reward, sampling_of(config, tokenizer), tokenizer)

        def measure(step: int) -> Mapping[str, float]:
            with phase("first sync", step):
                policy.publish(step)
            return {**evaluation.measure(step), **rollout.counts()}

        evaluate_alone(config, policy, measure)


def _make_trainer(
    config: Config, lane: CommandLane, engines: Path, tokenizer: PreTrainedTokenizerBase, stack: ExitStack
) -> PPOTrainer:
    algorithm = make_algorithm(config.algorithm)
    publisher, rollout, reward = _make_services(config, lane, engines, tokenizer, stack)
    roles = Roles(
        policy=RankedPolicy(lane, publisher, config),
        critic=RankedCritic(lane) if algorithm.needs_critic else None,
        reference=RankedReference(lane) if config.algorithm.needs_reference else None,
        rollout=rollout,
        reward=reward,
    )
    prompts = PromptSource(config.data, tokenizer, config.run.seed)
    logger.info("prompts: %d; over the length limit: %s", len(prompts), dict(prompts.drops))
    sampling = sampling_of(config, tokenizer)
    stream = GroupStream(prompts, rollout, reward, sampling, greedy_baseline=algorithm.greedy_baseline)
    controller = make_kl_controller(config.algorithm)
    dims = config.parallel.dims(config.num_trainer_ranks)
    learner = Learner(config.algorithm, config.batching, dims, roles, controller, critic_first=algorithm.critic_first)
    rules = BatchRules(
        prompts_per_step=config.data.prompts_per_step,
        max_new_tokens=config.rollout.max_new_tokens,
        algorithm=config.algorithm,
        group_advantages=algorithm.group_advantages,
        sources=frozenset(config.data.sources),
    )
    return PPOTrainer(config.run, roles, stream, Batcher(rules), learner)


def _make_services(
    config: Config, lane: CommandLane, engines: Path, tokenizer: PreTrainedTokenizerBase, stack: ExitStack
) -> tuple[EnginePublisher | None, RolloutService, RewardService]:
    publisher, rollout = _make_rollout(config, lane, engines, stack)
    stack.callback(rollout.close)
    pool = make_reward_service(config.reward, answer_decoder(config, tokenizer))
    stack.callback(pool.close)
    return publisher, rollout, pool


def _make_rollout(
    config: Config, lane: CommandLane, engines: Path, stack: ExitStack
) -> tuple[EnginePublisher | None, RolloutService]:
    if config.rollout.replay is not None:
        return None, RolloutReplay(config.rollout.replay)
    recorder = None
    if config.rollout.record is not None and not config.evaluation.only:
        recorder = RolloutRecorder(config.rollout.record)
        stack.callback(recorder.close)
    publisher = EnginePublisher(
        lane, engines, start_timeout_s=config.rollout.start_timeout_s, shares_devices=config.cluster.colocated
    )
    fleet = read_fleet(engines)
    rollout = HttpRolloutService(
        [member.url for member in fleet.members],
        config.rollout,
        read_architecture(config.model.path).vocab_size,
        recorder,
        api_key=fleet.keys.api_key,
        care=EngineCare(recover=publisher.publish_again, report_unwell=publisher.report_unwell),
    )
    publisher.adopt = rollout.use
    return publisher, rollout


def sampling_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> SamplingSpec:
    """How training rollouts are sampled; the tokenizer's end of sequence always stops."""
    stops = list(config.rollout.stop_token_ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(int(tokenizer.eos_token_id))
    return SamplingSpec(
        num_samples=config.rollout.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_token_ids=tuple(stops),
        seed=config.run.seed,
    )
