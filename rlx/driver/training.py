"""The driver's part of reinforcement learning: wires the roles together and runs the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlx.algos.kl_controller import make_kl_controller
from rlx.algos.registry import make_algorithm
from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.config.parts import loaded_models
from rlx.config.schema import Config, RolloutConfig
from rlx.data.images.pixels import image_folder
from rlx.data.images.reader import image_reader
from rlx.data.plan import Budget
from rlx.data.prompts import PromptSource
from rlx.data.tokenizer import answer_decoder, tokenizer_of
from rlx.driver.batcher import Batcher, BatchRules
from rlx.driver.evaluate import Evaluation, evaluation_sets
from rlx.driver.groups import GroupStream
from rlx.driver.keeping import KeptModels
from rlx.driver.lane import CommandLane
from rlx.driver.ppo import Learner, PPOTrainer
from rlx.driver.publishing import EnginePublisher
from rlx.driver.ranks import RankedCritic, RankedPolicy, RankedReference
from rlx.driver.roles import Roles, RolloutService
from rlx.driver.run import evaluate_alone, run
from rlx.engines.fleet import Fleet, read_fleet
from rlx.models.hf.fingerprint import origin_of
from rlx.obs.log import logger, phase
from rlx.rewards.pool.pools import make_reward_service
from rlx.rollout.generate import HttpRolloutService
from rlx.rollout.images import ImageStore
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


def drive(config: Config, lane: CommandLane, engines: Path, *, stop_asked: Callable[[], bool]) -> bool:
    """Train, or only evaluate, to the end; False when ``stop_asked`` ended it early."""
    tokenizer = tokenizer_of(config.model, config.data)
    dims, budget = config.parallel.dims(config.num_trainer_ranks), Budget.of(config.model, config.parallel, config.batching)
    publisher: EnginePublisher | None = None
    rollout: RolloutService
    with ExitStack() as stack:
        if config.rollout.replay is not None:
            rollout = RolloutReplay(config.rollout.replay)
        else:
            recorder = None
            if config.rollout.record is not None and not config.evaluation.only:
                recorder = stack.enter_context(closing(RolloutRecorder(config.rollout.record)))
            limit_s, shares = config.rollout.start_timeout_s, config.cluster.colocated
            publisher = EnginePublisher(lane, engines, start_timeout_s=limit_s, shares_devices=shares)
            arch, pictures = read_architecture(config.model.path), image_folder(config.run.dir)
            rollout = _served(config.rollout, publisher, read_fleet(engines), arch, pictures, recorder)
        stack.callback(rollout.close)
        skips, stops = config.reward.skip_special_tokens, config.rollout.stop_token_ids
        decode = answer_decoder(tokenizer, config.model.path, stops, skip_special_tokens=skips)
        reward = make_reward_service(config.reward, decode)
        stack.callback(reward.close)
        policy = RankedPolicy(lane, publisher, dims, partial(origin_of, loaded_models(config), tokenizer))
        sampling = sampling_of(config.rollout, tokenizer, config.run.seed)
        images = image_reader(config.model.path, config.data, tokenizer, image_folder(config.run.dir))
        sets = evaluation_sets(config.evaluation, config.data, tokenizer, sampling, images)
        if config.evaluation.only:
            evaluation = Evaluation(sets, rollout, reward, config.evaluation.pass_reward)

            def measure(step: int) -> Mapping[str, float]:
                with phase("first sync", step):
                    policy.publish(step)
                return {**evaluation.measure(step), **rollout.counts()}

            return evaluate_alone(config, policy, measure)
        algorithm = make_algorithm(config.algorithm)
        roles = Roles(
            policy=policy,
            critic=RankedCritic(lane) if algorithm.needs_critic else None,
            reference=RankedReference(lane) if config.algorithm.needs_reference else None,
            rollout=rollout,
            reward=reward,
        )
        prompts = PromptSource(config.data, tokenizer, config.run.seed, images)
        logger.info("prompts: %d; over the length limit: %s", len(prompts), dict(prompts.drops))
        stream = GroupStream(prompts, rollout, reward, sampling, greedy_baseline=algorithm.greedy_baseline)
        controller = make_kl_controller(config.algorithm)
        learner = Learner(config.algorithm, budget, dims, roles, controller, critic_first=algorithm.critic_first)
        rules = BatchRules(
            prompts_per_step=config.data.prompts_per_step,
            max_new_tokens=config.rollout.max_new_tokens,
            algorithm=config.algorithm,
            group_advantages=algorithm.group_advantages,
            sources=frozenset(config.data.sources),
        )
        trainer = PPOTrainer(config.run, roles, stream, Batcher(rules), learner)
        evaluation = Evaluation(sets, rollout, reward, config.evaluation.pass_reward)
        return run(config, Reinforcement(trainer, evaluation, lane), stop_asked=stop_asked)


def _served(
    config: RolloutConfig,
    publisher: EnginePublisher,
    fleet: Fleet,
    arch: Architecture,
    images: Path,
    recorder: RolloutRecorder | None,
) -> HttpRolloutService:
    """Rollouts from engines, which the publisher brings to new weights."""
    rollout = HttpRolloutService(
        [member.url for member in fleet.members],
        config,
        arch.vocab_size,
        recorder,
        api_key=fleet.keys.api_key,
        care=EngineCare(recover=publisher.publish_again, report_unwell=publisher.report_unwell),
    )
    if arch.vision is not None:
        rollout.show(ImageStore(folder=images, vision=arch.vision))
    publisher.adopt = rollout.use
    return rollout


def sampling_of(rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> SamplingSpec:
    """How training rollouts are sampled; the tokenizer's end of sequence always stops."""
    stops = list(rollout.stop_token_ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(int(tokenizer.eos_token_id))
    return SamplingSpec(
        num_samples=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=tuple(stops),
        seed=seed,
    )
