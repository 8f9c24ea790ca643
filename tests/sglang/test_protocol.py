"""What rlx asks of an engine, asked of both kinds: the embedded one always, stock SGLang with ``-m sglang``."""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from rlx.config.schema import RolloutConfig
from rlx.rollout.generate import HttpRolloutService
from rlx.rollout.keys import EngineKeys
from rlx.rollout.sglang.client import EngineClient
from rlx.rollout.sglang.control import EngineControlError
from rlx.sync.chunks import flatten
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.publisher import Publisher
from rlx.types.rollout import Prompt, SamplingSpec
from tests.sglang.engines import RunningEngine
from tests.sglang.models import VOCAB, greedy, make, save, scores, sequences
from tests.sglang.publishers import canary_of, make_publisher

pytestmark = pytest.mark.timeout(900)  # the first test waits for the engine

TOLERANCE = 1e-5


def publisher_of(engine: RunningEngine, model, transport: str = "stream", **settings) -> Publisher:
    canary = canary_of(lambda rows, images: [scores(model, row) for row in rows])
    return make_publisher(engine, model, canary, transport=transport, **({"flatten_below_bytes": 9_000} | settings))


def weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    return iter([(name, tensor.detach()) for name, tensor in model.state_dict().items()])


def worst(engine: RunningEngine, model, seed: int = 5) -> float:
    control = engine.control()
    rows = [*sequences(seed, [2, 9, 33]), [5, VOCAB - 1, 0, VOCAB - 1, VOCAB - 1, 3]]
    found = max(abs(ours - theirs) for row in rows for ours, theirs in zip(control.score(row), scores(model, row), strict=True))
    control.close()
    return found


def generate(engine: RunningEngine, tokens: list[int], spec: SamplingSpec):
    async def ask():
        client = EngineClient(engine.url, 120, engine.keys.api_key, vocab_size=VOCAB)
        try:
            return await client.generate(tokens, spec, 1)
        finally:
            await client.close()

    return asyncio.run(ask())


def test_scores_and_greedy_answers_are_those_of_transformers(engine: RunningEngine) -> None:
    model = make("llama", 1)
    assert worst(engine, model) < TOLERANCE
    for prompt in sequences(8, [1, 14, 40]):
        answer = generate(engine, prompt, SamplingSpec(max_new_tokens=11, temperature=0.0))
        want, lead = greedy(model, prompt, 11)
        assert lead < TOLERANCE or list(answer.token_ids) == want
        assert answer.finish_reason == "length"
        assert answer.rollout_logprobs == pytest.approx(scores(model, prompt + want)[-11:], abs=TOLERANCE)
    sampled = generate(engine, prompt, SamplingSpec(max_new_tokens=9, temperature=0.7))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(sampled.token_ids)])).logits[0, -10:-1].double() / 0.7
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(sampled.token_ids)[:, None])[:, 0].tolist()
    assert sampled.rollout_logprobs == pytest.approx(wanted, abs=TOLERANCE)


def test_the_keys_open_what_they_are_for_and_are_shown_nowhere(engine: RunningEngine) -> None:
    def status(path: str, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}, "mode": "abort"}
        return httpx.post(engine.url + path, json=body, headers=headers, timeout=60, trust_env=False).status_code

    keys = engine.keys
    assert [status("/generate", key) for key in (None, "x", keys.admin_key)] == [401, 401, 401]
    assert [status("/pause_generation", key) for key in (None, "x", keys.api_key)] == [401, 401, 401]
    assert status("/generate", keys.api_key) == 200
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    environment = Path(f"/proc/{engine.child.pid}/environ").read_text()
    for key in (keys.api_key, keys.admin_key):
        assert key is not None and key not in listing and key not in environment and key not in engine.log
        assert key not in repr(keys)
    with pytest.raises(EngineControlError, match="401") as caught:
        engine.control(keys=EngineKeys(api_key="a", admin_key="b")).pause()
    assert caught.value.refused
    assert httpx.get(engine.url + "/health", timeout=60, trust_env=False).status_code == 200


@pytest.mark.parametrize("transport", ["stream", "broadcast"])
def test_published_weights_serve_and_refusals_name_the_tensor(engine: RunningEngine, transport: str) -> None:
    model, wrong = make("llama", 21), make("llama", 22)
    publisher = publisher_of(engine, model, transport)
    try:
        publisher.publish(7, weights(model))
        assert engine.control().weight_version() == "7" and worst(engine, model) < TOLERANCE
        publisher.publish(8, weights(model))
        with pytest.raises(CanaryError, match=engine.url):
            publisher.publish(9, weights(wrong))
    finally:
        publisher.close()
    engine.control().resume()
    name = "model.layers.0.input_layernorm.weight"
    strange = make("llama", 23).state_dict() | {name: torch.zeros(47)}
    unlike = type("Strange", (), {"state_dict": lambda self: strange})()
    publisher = publisher_of(engine, unlike, transport, canary_first=0, canary_every=0)
    try:
        with pytest.raises(SyncError, match=rf"engine side, stage 0, phase {transport}.*{engine.url}") as caught:
            publisher.publish(10, iter(strange.items()))
        assert "layernorm" in str(caught.value) or "47" in str(caught.value)
        assert not caught.value.engines, "the engine is well; starting it again would not help"
    finally:
        publisher.close()


@pytest.mark.parametrize(("shape", "says"), [((VOCAB + 1, 48), "vocab_size is 131"), ((VOCAB, 40), "hidden_size is 48")])
def test_another_model_is_refused_before_anything_is_sent(engine: RunningEngine, shape: tuple[int, int], says: str) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(shape)}
    publisher = publisher_of(engine, type("Other", (), {"state_dict": lambda self: tensors})())
    with pytest.raises(SyncError, match=rf"phase model: .*engine {engine.url} serves another model .*: its {says}") as caught:
        publisher.publish(1, iter(tensors.items()))
    assert not caught.value.engines
    publisher.close()
    assert engine.control().weight_version() == "default"


@pytest.mark.parametrize("transport", ["stream", "broadcast", "shm"])
def test_a_tensor_that_arrives_as_another_is_named(
    engine: RunningEngine, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Where an engine gives checksums, however small the difference."""
    model = make("llama", 25)
    publisher = publisher_of(engine, model, transport)
    number = publisher.publish(3, weights(model)).canary.num_proved
    assert number > 0 if engine.kind == "sglang" else number == 0
    name = "model.layers.1.self_attn.k_proj.weight"

    def altered(chunk) -> torch.Tensor:
        for info, tensor in zip(chunk.infos, chunk.tensors, strict=True):
            if info.name == name:
                tensor[3, 5] += 1e-6
        return flatten(chunk)

    for lane in ("stream", "broadcast", "shared_memory"):
        monkeypatch.setattr(f"rlx.sync.transports.{lane}.flatten", altered)
    copies = iter([(each, tensor.clone()) for each, tensor in weights(model)])
    if engine.kind == "embedded":
        publisher.publish(4, copies)
    else:
        with pytest.raises(CanaryError, match=r"phase checksums: .*: model.layers.1.self_attn.qkv_proj.weight$"):
            publisher.publish(4, copies)
    publisher.close()
    engine.control().resume()


def test_an_update_that_broke_off_does_not_block_the_next(engine: RunningEngine) -> None:
    for _ in range(2):
        control = engine.control()
        control.begin_update()
        control.close()
    model = make("llama", 24)
    publisher = publisher_of(engine, model)
    publisher.publish(5, weights(model))
    publisher.close()
    assert worst(engine, model) < TOLERANCE


def test_weights_from_a_folder(engine: RunningEngine, tmp_path: Path) -> None:
    folder = save("llama", 31, tmp_path / "new")
    control = engine.control()
    control.pause()
    control.update_weights_from_disk(str(folder), "12")
    control.resume()
    assert control.weight_version() == "12" and worst(engine, make("llama", 31)) < TOLERANCE
    with pytest.raises(EngineControlError):
        control.update_weights_from_disk(str(tmp_path / "nowhere"), "13")
    assert control.weight_version() == "12"
    control.close()


@pytest.mark.parametrize("rounds", [8, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.sglang])])
def test_two_syncs_a_second_under_load(engine: RunningEngine, rounds: int) -> None:
    """Nothing hangs, nothing is lost, and each token's log-prob is that of the version it is labelled with."""
    models = [make("llama", 41), make("llama", 42)]
    config = RolloutConfig(max_concurrent_requests=12, max_retries=0, request_timeout_s=120)
    service = HttpRolloutService([engine.url], config, VOCAB, api_key=engine.keys.api_key)
    prompts = [Prompt(prompt_id=n, text="", token_ids=tuple(ids)) for n, ids in enumerate(sequences(4, [6] * 40))]
    spec = SamplingSpec(max_new_tokens=60, num_samples=2)
    publisher = publisher_of(engine, models[0], canary_first=0, canary_every=0)
    publisher.publish(0, weights(models[0]))
    done, groups, failures, longest = threading.Event(), [], [], 0.0

    def load() -> None:
        try:
            while not done.is_set():
                groups.append(list(service.generate(prompts, spec)))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for version in range(1, rounds + 1):
            began = time.monotonic()
            longest = max(longest, publisher.publish(version, weights(models[version % 2])).seconds)
            assert engine.control().weight_version() == str(version)
            time.sleep(max(0.0, 0.5 - (time.monotonic() - began)))
    finally:
        done.set()
        thread.join(120)
        publisher.close()
        service.close()
    assert not failures and not thread.is_alive()
    assert all(len(batch) == len(prompts) for batch in groups)
    samples = [each for batch in groups for group in batch for each in group.trajectories]
    assert all(each.num_sampled == 60 for each in samples) and service.stats.failures == 0
    mixed = [each for each in samples if len(set(each.weight_versions[-60:])) > 1]
    assert mixed
    difference = 0.0
    for each in random.sample(mixed, min(len(mixed), 20)) + random.sample(samples, min(len(samples), 10)):
        rows = [scores(model, each.token_ids.tolist())[-60:] for model in models]
        for place, version in enumerate(each.weight_versions[-60:]):
            difference = max(difference, abs(rows[version % 2][place] - each.rollout_logprobs[-60:][place]))
    print(
        f"{rounds} syncs, longest {longest:.3g} s, {len(samples)} answers, {len(mixed)} over several versions,"
        f" {service.stats.resubmissions} resubmissions, worst difference {difference:.2g}"
    )
    assert difference < 2 * TOLERANCE
