"""Images through both kinds of engines: exact token ids, towers that move, answers that go on. Against transformers, in fp32."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from rlx.rollout.completion import Completion
from rlx.rollout.images import ImageStore, PlacedImages
from rlx.rollout.sglang.answers import EngineError
from rlx.rollout.sglang.client import EngineClient
from rlx.rollout.sglang.control import EngineControlError
from rlx.rollout.sglang.image_request import NO_SUCH_FILE, write_entry
from rlx.sync.errors import CanaryError
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher
from rlx.types.precision import FP32
from rlx.types.rollout import ImageSpan, SamplingSpec
from tests.models_vision import END, IMAGE, START, VOCAB, Picture, expand, make, save, scores, vision_of, weights, write_picture
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import RunningEngine
from tests.sglang.publishers import make_publisher

pytestmark = pytest.mark.timeout(900)  # the first test waits for the engine

TOLERANCE = 2e-5
SGLANG = [pytest.mark.sglang, needs_sglang]
KINDS = [
    pytest.param(("embedded", "qwen2_5_vl"), id="embedded"),
    pytest.param(("embedded", "qwen2_vl"), id="embedded-qwen2_vl", marks=pytest.mark.slow),
    pytest.param(("sglang", "qwen2_5_vl"), id="sglang", marks=SGLANG),
    pytest.param(("sglang", "qwen2_vl"), id="sglang-qwen2_vl", marks=SGLANG),
]
TEXTS = [[5, 6, 7, 8, 9], [*range(100, 112)], [IMAGE, START, END, IMAGE, 200, 201, VOCAB - 1, 3]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An engine, the model that it began with, and the images that both see."""

    engine: RunningEngine
    model: PreTrainedModel
    store: ImageStore

    @property
    def pictures(self) -> list[Picture]:
        return [write_picture(self.store.folder, 1, 5, 8), write_picture(self.store.folder, 2, 3, 1)]

    def sequence(self, num_images: int) -> tuple[list[int], PlacedImages]:
        """0 to 2 images; text ends with the placeholder, sampled as it were."""
        one, two = self.pictures
        parts: list[list[list[int] | Picture]] = [[*TEXTS], [TEXTS[0], one, *TEXTS[1:]], [two, TEXTS[1], one, TEXTS[2]]]
        ids, spans = expand(parts[num_images])
        return ids, self.placed(spans)

    def placed(self, spans: Sequence[ImageSpan]) -> PlacedImages:
        return PlacedImages(store=self.store, spans=tuple(spans))

    def worst(self, model: PreTrainedModel, num_images: int) -> float:
        """How far the engine's scores are from those of ``model``, placeholders aside."""
        ids, images = self.sequence(num_images)
        control = self.engine.control()
        found, wanted = control.score(ids, images), scores(model, ids, images.spans, self.store.folder)
        control.close()
        return max(abs(a - b) for at, (a, b) in enumerate(zip(found, wanted, strict=True), 1) if at not in images.places)

    def wanted(self, ids: list[int], images: PlacedImages, answer: Completion) -> list[float]:
        """What transformers says of an answer's tokens."""
        count = len(answer.token_ids)
        return scores(self.model, [*ids, *answer.token_ids], images.spans, self.store.folder)[-count:]

    def ask(self, call: Callable[[EngineClient], object]) -> EngineClient:
        """Run a coroutine function with a client; the client, for its counts."""

        async def run() -> EngineClient:
            client = EngineClient(self.engine.url, 120, self.engine.keys.api_key, vocab_size=VOCAB)
            try:
                await call(client)  # type: ignore[misc]
            finally:
                await client.close()
            return client

        return asyncio.run(run())

    def publisher(
        self, model: PreTrainedModel, judge: PreTrainedModel, transport: str, *, sees: bool = True, frozen: bool = False
    ) -> Publisher:
        """Of ``model``, whose scores are said to be those of ``judge``; ``frozen``: its tower never changes."""
        folder = self.store.folder
        canary = CanarySpec(
            vocab_size=VOCAB,
            seed=5,
            precision=FP32,
            score_on_trainer=lambda rows, images: [
                scores(judge, row, spans, folder) for row, spans in zip(rows, images, strict=True)
            ],
            images=self.store if sees else None,
        )
        named = SimpleNamespace(state_dict=lambda: weights(model))
        constant = frozenset(tower_of(model) if frozen else ())
        return make_publisher(self.engine, named, canary, transport=transport, constant=constant, bucket_bytes=1_000_000)


def tower_of(model: PreTrainedModel) -> set[str]:
    return {name for name in weights(model) if name.startswith("visual.")}


def with_tower(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """``model`` with the tower of ``other``."""
    found = make(model.config.model_type)
    found.load_state_dict(model.state_dict() | {k: v for k, v in other.state_dict().items() if ".visual." in k})
    return found


def publish(publisher: Publisher, model: PreTrainedModel, version: int) -> set[str]:
    """The names of what was sent."""
    return {info.name for info in publisher.publish(version, iter(weights(model).items())).tensors}


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, start: Callable[..., RunningEngine], tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, family = request.param
    model = make(family)
    with torch.no_grad():  # the placeholder is sampled often
        model.lm_head.weight[IMAGE] *= 2.5
    folder = tmp_path_factory.mktemp("vision")
    engine = start(kind, save(model, folder / "model"), server_args={"mem_fraction_static": 0.3} if kind == "sglang" else {})
    return Case(engine=engine.wait(), model=model, store=ImageStore(folder=folder / "images", vision=vision_of(model)))


@pytest.fixture
def case(shared: Case) -> Iterator[Case]:
    """Afterwards the engine has its first weights again, and nothing of images that the others made."""
    yield shared
    control = shared.engine.control()
    control.pause()
    control.resume()
    control.close()
    publisher = shared.publisher(shared.model, shared.model, "stream", sees=False)
    publish(publisher, shared.model, 0)
    publisher.close()


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_scores_are_those_of_transformers(case: Case, num_images: int) -> None:
    assert case.worst(case.model, num_images) < TOLERANCE


def test_samples_have_the_log_probs_of_transformers(case: Case) -> None:
    """Also where images are of different sizes, so that each row of a batch goes on from a position of its own."""
    answers: list[Completion] = []
    spec = SamplingSpec(max_new_tokens=24)
    prompts = [case.sequence(number) for number in (0, 1, 2, 1)]

    async def ask(client: EngineClient) -> None:
        answers.extend(await asyncio.gather(*(client.generate(ids, spec, n, images) for n, (ids, images) in enumerate(prompts))))

    case.ask(ask)
    for (ids, images), answer in zip(prompts, answers, strict=True):
        assert answer.rollout_logprobs == pytest.approx(case.wanted(ids, images, answer), abs=TOLERANCE)


def test_the_same_image_is_seen_by_a_tower_that_has_moved(case: Case) -> None:
    """The canary asks about its pictures before and after as well."""
    moved = with_tower(case.model, make(case.model.config.model_type, 7))
    publisher = case.publisher(case.model, case.model, "stream")
    publish(publisher, case.model, 1)
    assert case.worst(case.model, 1) < TOLERANCE and case.worst(moved, 1) > 0.1
    publisher.close()
    publisher = case.publisher(moved, moved, "stream")
    for version in (2, 3):
        publish(publisher, moved, version)
        assert case.worst(moved, 1) < TOLERANCE and case.worst(moved, 2) < TOLERANCE
    publisher.close()


@pytest.mark.parametrize("transport", ["stream", "broadcast", "shm"])
def test_a_frozen_tower_is_sent_once(case: Case, transport: str) -> None:
    """Also to an engine whose tower was another; the same image is seen by it and by text that moves."""
    first = make(case.model.config.model_type, 9)
    publisher = case.publisher(first, first, transport, frozen=True)
    assert publish(publisher, first, 1) == weights(first).keys() and case.worst(first, 2) < TOLERANCE
    publisher._canary = None  # of these versions the scores say enough
    for version in (2, 3):
        moved = with_tower(make(case.model.config.model_type, 20 + version), first)
        assert publish(publisher, moved, version) == weights(moved).keys() - tower_of(moved)
        assert case.worst(moved, 1) < TOLERANCE and case.worst(moved, 2) < TOLERANCE
    publisher.close()


def test_a_wrong_tower_does_not_pass_the_canary(case: Case) -> None:
    """One that text does not notice."""
    other = with_tower(case.model, make(case.model.config.model_type, 8))
    publisher = case.publisher(other, case.model, "stream", sees=False)
    publish(publisher, other, 1)
    publisher.close()
    publisher = case.publisher(other, case.model, "stream")
    with pytest.raises(CanaryError, match="scores unlike the trainer"):
        publish(publisher, other, 2)
    publisher.close()


def test_an_aborted_answer_goes_on_with_its_images(case: Case) -> None:
    """Although it holds the placeholder, which is text there."""
    ids, images = case.sequence(2)
    spec, done = SamplingSpec(max_new_tokens=100), threading.Event()
    answers: list[Completion] = []

    def interrupt() -> None:
        control = case.engine.control()
        while not done.wait(0.15):
            control.pause("abort")
            control.resume()
        control.close()

    async def ask(client: EngineClient) -> None:
        answers.extend(await asyncio.gather(*(client.generate(ids, spec, seed, images) for seed in range(4))))

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        client = case.ask(ask)
    finally:
        done.set()
        thread.join()
    assert client.stats.resubmissions >= 4 and client.stats.retries == 0
    whole = [answer for answer in answers if len(answer.token_ids) == 100]
    assert any(IMAGE in answer.token_ids[:50] for answer in whole)
    for answer in answers:
        assert answer.rollout_logprobs == pytest.approx(case.wanted(ids, images, answer), abs=TOLERANCE)


def test_what_does_not_fit_is_refused_and_not_asked_again(case: Case) -> None:
    ids, images = case.sequence(1)
    [span] = images.spans
    wrong = {
        "are not all image placeholders": [replace(span, start=span.start - 1)],
        "which the grid": [replace(span, grid=(1, 16, 10)), replace(span, grid=(1, 4, 40))],
        r"wanted \[1, h, w\]": [replace(span, grid=(1, 10, 15))],
        "inside the image before it": [span, span],
    }
    for says, spans in wrong.items():
        for given in [spans] if len(set(spans)) < len(spans) else [[each] for each in spans]:

            async def ask(client: EngineClient, given: Sequence[ImageSpan] = given, says: str = says) -> None:
                with pytest.raises(EngineError, match=f"HTTP 400.*{says}") as caught:
                    await client.generate(ids, SamplingSpec(max_new_tokens=2), 0, case.placed(given))
                assert not caught.value.retryable and client.stats.retries == 0

            case.ask(ask)
    for source, says in (({"path": "/nowhere.png"}, NO_SUCH_FILE), ({"data": "@"}, "no base64"), ({"data": "aaaa"}, "not those")):
        entry = write_entry("ab" * 32, span.start, span.grid, **source)
        with pytest.raises(EngineControlError, match=f"HTTP 400.*{says}"):
            case.engine.control()._json("POST", "/generate", {"input_ids": ids, "image_data": [entry]})


def test_bytes_do_as_paths_do(case: Case) -> None:
    ids, images = case.sequence(2)
    sampling = {"max_new_tokens": 0, "temperature": 1.0}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    entries = images.entries(as_data=True)
    answer = case.engine.control()._json("POST", "/generate", {**body, "image_data": entries})["meta_info"]
    assert isinstance(answer, dict) and answer["prompt_tokens"] == len(ids)
    wanted = scores(case.model, ids, images.spans, case.store.folder)
    found = [row[0] for row in answer["input_token_logprobs"][1:]]
    text = [at for at in range(1, len(ids)) if at not in images.places]
    assert [found[at - 1] for at in text] == pytest.approx([wanted[at - 1] for at in text], abs=TOLERANCE)
    assert case.engine.control().model_info()["has_image_understanding"] is True


@pytest.mark.sglang
@needs_sglang
@pytest.mark.parametrize("keeps", [False, True])
def test_what_stock_sglang_keeps_of_images_does_not_pass_unseen(
    start: Callable[..., RunningEngine], tmp_path: Path, keeps: bool
) -> None:
    """Where weights come without the receiver it must keep nothing; if it does, the canary finds it."""
    model = make()
    options = {"server_args": {"mem_fraction_static": 0.3}, "transport": "stream" if keeps else "broadcast"}
    engine = start("sglang", save(model, tmp_path / "model"), **options).wait()
    case = Case(engine=engine, model=model, store=ImageStore(folder=tmp_path / "images", vision=vision_of(model)))
    moved = with_tower(model, make(seed=7))
    publisher = case.publisher(model, model, "broadcast")
    publish(publisher, model, 1)
    publisher.close()
    publisher = case.publisher(moved, moved, "broadcast")
    if keeps:
        with pytest.raises(CanaryError, match="scores unlike the trainer"):
            publish(publisher, moved, 2)
    else:
        publish(publisher, moved, 2)
        assert case.worst(moved, 2) < TOLERANCE
    publisher.close()


@pytest.mark.sglang
@needs_sglang
def test_a_server_without_the_package_is_refused(start: Callable[..., RunningEngine], tmp_path: Path) -> None:
    model = make()
    options = {"server_args": {"mem_fraction_static": 0.3}, "without": "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"}
    engine = start("sglang", save(model, tmp_path / "model"), **options).wait()
    case = Case(engine=engine, model=model, store=ImageStore(folder=tmp_path / "images", vision=vision_of(model)))
    ids, images = case.sequence(1)

    async def ask(client: EngineClient) -> None:
        with pytest.raises(EngineError, match="needs the package RUN_DIR/engines/modules/rlx_images"):
            await client.generate(ids, SamplingSpec(max_new_tokens=2), 0, images)
        assert client.stats.requests == 1
        assert (await client.generate(TEXTS[0], SamplingSpec(max_new_tokens=2), 0)).token_ids

    case.ask(ask)
