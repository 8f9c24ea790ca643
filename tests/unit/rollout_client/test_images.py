"""Images beside token ids: what is sent, what is sent again, and which engines and answers are refused."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlx.config.schema import RolloutConfig
from rlx.data.images.pixels import image_file
from rlx.rollout.generate import HttpRolloutService
from rlx.rollout.images import ImageStore, PlacedImages, check_places
from rlx.rollout.sglang.answers import Asked, EngineError, parse_scores
from rlx.rollout.sglang.client import EngineClient, RetryPolicy
from rlx.rollout.sglang.image_request import KNOWS_FORM, NO_SUCH_FILE, PROBE
from rlx.types.rollout import ImageSpan, Prompt, SamplingSpec
from tests.tower import tower
from tests.unit.rollout_client.peer import VOCAB, Answer, Behaviour, Peer, answer_to, draw, expected

IMAGE = 17
VISION = tower(IMAGE)
SPAN = ImageSpan(key="ab" * 32, start=2, grid=(1, 2, 4))
PROMPT = (3, 19, IMAGE, IMAGE, 20, 5)
SPEC = SamplingSpec(max_new_tokens=6)


@pytest.fixture
def images(tmp_path: Path) -> PlacedImages:
    file = image_file(tmp_path, SPAN.key)
    file.parent.mkdir()
    file.write_bytes(b"pixels")
    return PlacedImages(store=ImageStore(folder=tmp_path, vision=VISION), spans=(SPAN,))


def refusal(message: str, status: int = 400) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def answering(*turns: Callable[[Answer], web.Response | Answer]) -> Behaviour:
    """An engine that knows the form; one turn after the other, the last one again and again."""
    left = list(turns)

    async def behaviour(peer: Peer, payload: Answer) -> web.Response | Answer:
        if payload.get("image_data") == [PROBE]:
            return refusal(f"rlx_images: form 0; {KNOWS_FORM}")
        return (left.pop(0) if len(left) > 1 else left[0])(payload)

    return behaviour


def entry(payload: Answer) -> dict[str, Any]:
    [text] = payload["image_data"]
    found: dict[str, Any] = json.loads(text.removeprefix("rlx_images:"))
    return found


async def generate(peer: Peer, images: PlacedImages, times: int = 1) -> tuple[int, ...]:
    client = EngineClient(peer.url, 20.0, vocab_size=VOCAB)
    client.retry = RetryPolicy(max_retries=3, base_s=0.01)
    try:
        answers = [await client.generate(PROMPT, SPEC, 7, images) for _ in range(times)]
    finally:
        await client.close()
    return answers[-1].token_ids


async def test_images_go_by_path_and_again_with_a_partial_answer(start_peer: Callable[..., Peer], images: PlacedImages) -> None:
    """Also where the answer so far holds the placeholder: it is text."""
    peer = start_peer(answering(lambda payload: answer_to(payload, abort_after=3), answer_to))
    assert await generate(peer, images) == tuple(expected(PROMPT, 7, 6)[0])
    probe, first, second = peer.seen
    assert probe["image_data"] == [PROBE]
    assert first["input_ids"] == list(PROMPT) and second["input_ids"] == [*PROMPT, *expected(PROMPT, 7, 3)[0]]
    file = str(image_file(images.store.folder, SPAN.key))
    wanted = {"form": 1, "key": SPAN.key, "start": 2, "grid": [1, 2, 4], "path": file}
    assert entry(first) == entry(second) == wanted


async def test_an_engine_is_asked_once_whether_it_takes_images(start_peer: Callable[..., Peer], images: PlacedImages) -> None:
    peer = start_peer(answering(answer_to))
    client = EngineClient(peer.url, 20.0, vocab_size=VOCAB)
    try:
        await asyncio.gather(*(client.generate(PROMPT, SPEC, seed, images) for seed in range(5)))
    finally:
        await client.close()
    assert [payload["image_data"] == [PROBE] for payload in peer.seen] == [True] + [False] * 5


async def test_an_engine_that_does_not_see_the_folder_gets_the_bytes(
    start_peer: Callable[..., Peer], images: PlacedImages
) -> None:
    def answer(payload: Answer) -> web.Response | Answer:
        return refusal(f"{NO_SUCH_FILE} {SPAN.key}: nowhere") if "path" in entry(payload) else answer_to(payload)

    peer = start_peer(answering(answer))
    await generate(peer, images, times=2)
    ways = ["path" if "path" in entry(payload) else "data" for payload in peer.seen[1:]]
    assert ways == ["path", "data", "data"]
    assert base64.b64decode(entry(peer.seen[-1])["data"]) == b"pixels"


async def test_a_refused_image_is_not_asked_again(start_peer: Callable[..., Peer], images: PlacedImages) -> None:
    peer = start_peer(answering(lambda payload: refusal("rlx_images: image_data[0]: grid is [1, 3, 3]")))
    with pytest.raises(EngineError, match=r"HTTP 400.*grid is \[1, 3, 3\]"):
        await generate(peer, images)
    assert len(peer.seen) == 2


@pytest.mark.parametrize(("text", "status"), [("Internal Server Error", 500), ("unknown field", 400), (None, 200)])
async def test_an_engine_without_the_package_is_refused(
    start_peer: Callable[..., Peer], images: PlacedImages, text: str | None, status: int
) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> web.Response | Answer:
        payload["sampling_params"] |= {"stop_token_ids": [], "sampling_seed": 1}
        return answer_to(payload) if text is None else refusal(text, status)

    peer = start_peer(behaviour)
    with pytest.raises(EngineError, match="needs the package RUN_DIR/engines/modules/rlx_images") as caught:
        await generate(peer, images)
    assert len(peer.seen) == 1 and not caught.value.retryable and (text or "an answer") in str(caught.value)


async def test_an_engine_that_is_gone_is_no_engine_without_the_package(
    start_peer: Callable[..., Peer], images: PlacedImages
) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> web.Response | Answer | None:
        return None if len(peer.seen) == 1 else await answering(answer_to)(peer, payload)  # type: ignore[return-value]

    peer = start_peer(behaviour)
    assert await generate(peer, images) == tuple(expected(PROMPT, 7, 6)[0])


def test_placeholders_may_be_echoed_as_0_and_nothing_else(images: PlacedImages) -> None:
    def answer(*echoes: int) -> Answer:
        rows = [[None, PROMPT[0], None], *([draw(list(PROMPT[:i]), 0)[1], echoes[i], None] for i in range(1, len(PROMPT)))]
        return {"meta_info": {"finish_reason": {"type": "length"}, "prompt_tokens": len(PROMPT), "input_token_logprobs": rows}}

    asked = Asked(url="http://e", token_ids=PROMPT, vocab_size=VOCAB, places=images.places)
    assert images.places == {2, 3}
    assert len(parse_scores(answer(*PROMPT), asked)) == len(parse_scores(answer(3, 19, 0, 0, 20, 5), asked)) == 5
    for wrong in ((3, 0, 0, 0, 20, 5), (3, 19, 1, 0, 20, 5), (3, 19, 0, 0, 0, 5)):
        with pytest.raises(EngineError, match="expected"):
            parse_scores(answer(*wrong), asked)


def prompt(**more: Any) -> Prompt:
    fields: dict[str, Any] = {"prompt_id": 4, "text": "", "token_ids": PROMPT, "images": (SPAN,)}
    return Prompt(**(fields | more))


async def test_groups_carry_their_images(start_peer: Callable[..., Peer], images: PlacedImages) -> None:
    peer = start_peer(answering(answer_to))
    service = HttpRolloutService([peer.url], RolloutConfig(), VOCAB)
    service.show(images.store)
    try:
        plain = prompt(prompt_id=5, images=(), token_ids=(1, IMAGE))
        spec = SamplingSpec(max_new_tokens=2, num_samples=2)
        groups = await asyncio.to_thread(lambda: list(service.generate([prompt(), plain], spec)))
    finally:
        service.close()
    found = {group.prompt.prompt_id: [each.images for each in group.trajectories] for group in groups}
    assert found == {4: [(SPAN,), (SPAN,)], 5: [(), ()]}
    sent = [payload for payload in peer.seen if payload.get("image_data") != [PROBE]]
    assert sorted("image_data" in payload for payload in sent) == [False, False, True, True]


def test_images_where_they_cannot_be_are_refused_before_anything_is_sent(images: PlacedImages) -> None:
    service = HttpRolloutService(["http://127.0.0.1:1"], RolloutConfig(), VOCAB)
    with pytest.raises(ValueError, match="prompt 4 has images, and the model does not see any"):
        service.generate([prompt()], SPEC)
    service.show(images.store)
    with pytest.raises(ValueError, match=r"prompt 4: tokens 2 to 3 are not the placeholders of image ababab"):
        service.generate([prompt(token_ids=(3, 19, IMAGE, 20, 5))], SPEC)
    with pytest.raises(ValueError, match="tokens 2 to 3"):
        check_places(PROMPT, (SPAN, SPAN), VISION, "prompt 4")
