"""Two pipeline stages in two processes, each holding half the tensors; an engine that dies; many syncs under load."""

from __future__ import annotations

import queue
import random
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlx.config.schema import SyncConfig
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.transports.handover import Seats
from tests.dist.sync_lab import (
    VOCAB,
    half,
    make_publisher,
    named,
    new_model,
    reference_scores,
    shared_engines,
    small_config,
    stop_shared_engines,
    wait_until,
    worst_difference,
)

LAST_STAGE_TENSOR = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def urls():
    return shared_engines().urls


def plant(scenario: str, stage: int, tensors):
    if stage == 1 and scenario == "corrupt":
        return [(name, tensor + 0.5 if name == LAST_STAGE_TENSOR else tensor) for name, tensor in tensors]
    if stage == 0 and scenario == "drop":
        return tensors[1:]
    if stage == 1 and scenario == "stray":
        return [*tensors, ("model.embed_tokens.weight", torch.randn(VOCAB, 24))]
    return tensors


def join_stages(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def share(text):
    texts: list[str | None] = [None, None]
    dist.all_gather_object(texts, text)
    return texts


def stage_rank(rank: int, store: str, urls: list[str], scenarios: list[tuple[str, int]], transport: str, answers) -> None:
    """One trainer rank: publishes each scenario with a fresh publisher and reports what happened."""
    join_stages(rank, store)
    for version, (scenario, seed) in enumerate(scenarios, start=1):
        model = new_model(seed)
        place = PublisherPlace(stage=rank, num_stages=2, is_sender=True, is_lead=rank == 0, rank=rank)
        seats = Seats(by_engine={0: [1], 1: [0]}, spread=lambda buffer, stage: dist.broadcast(buffer, src=stage))
        publisher = make_publisher(urls, model, place=place, share=share, transport=transport, seats=seats)
        try:
            manifest = publisher.publish(version, iter(plant(scenario, rank, half(named(model), rank))))
            answers.put((rank, scenario, "ok", sorted(info.name for info in manifest.tensors)))
        except SyncError as error:
            answers.put((rank, scenario, type(error).__name__, str(error)))
        except Exception:
            answers.put((rank, scenario, "broken", traceback.format_exc()))
        publisher.close()
        dist.barrier()
        if rank == 0:
            for url in urls:
                EngineControl(url, timeout_s=10).resume()
    dist.destroy_process_group()


def run_stages(tmp_path, urls, scenarios, transport):
    """Stage 0 runs in this process, stage 1 in a spawned one."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    arguments = (str(tmp_path / "store"), urls, scenarios, transport, answers)
    second = context.Process(target=stage_rank, args=(1, *arguments), daemon=True)
    second.start()
    try:
        stage_rank(0, *arguments)
        got = [answers.get(timeout=30) for _ in range(2 * len(scenarios))]
        second.join(15)
        assert second.exitcode == 0
    finally:
        second.kill()
        second.join(5)
    return {(rank, scenario): (outcome, detail) for rank, scenario, outcome, detail in got}


@pytest.mark.parametrize("transport", ["stream", "ipc"])
def test_two_stages_deliver_halves_and_share_failures(urls, tmp_path, transport):
    scenarios = [("corrupt", 11), ("drop", 12), ("stray", 13), ("good", 14)]
    outcomes = run_stages(tmp_path, urls, scenarios, transport)
    for rank in range(2):
        outcome, text = outcomes[rank, "corrupt"]
        assert outcome == "CanaryError" and f"{LAST_STAGE_TENSOR} (by up to 0.5" in text and urls[0] in text
        outcome, text = outcomes[rank, "drop"]
        assert outcome == "SyncError" and "missing: model.embed_tokens.weight" in text and "trainer rank" in text
        outcome, text = outcomes[rank, "stray"]
        assert outcome == "SyncError" and "stage 1, phase check: tensor model.embed_tokens.weight is sent twice" in text
        assert outcomes[rank, "good"] == ("ok", sorted(dict(named(new_model(14)))))
    assert max(worst_difference(url, new_model(14)) for url in urls) < 1e-4
    assert [EngineControl(url, timeout_s=5).weight_version() for url in urls] == ["4", "4"]


class Load:
    """Clients that keep requests in flight, which syncs interrupt."""

    def __init__(self, urls: list[str], num_clients: int) -> None:
        self.spanning = 0  # answers that weights of several versions wrote
        self.finished: queue.Queue[tuple[str, list[int], str]] = queue.Queue()
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(urls[i % len(urls)],)) for i in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _client(self, url: str) -> None:
        try:
            with httpx.Client(timeout=30) as client:
                while not self._stop.is_set():
                    tokens = [random.randrange(VOCAB) for _ in range(5)]
                    sampling = {"max_new_tokens": 40, "temperature": 1.0, "ignore_eos": True}
                    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
                    answer = client.post(f"{url}/generate", json=body).raise_for_status().json()
                    self.spanning += len(answer["meta_info"]["weight_versions"]) > 1
                    self.finished.put((url, tokens + answer["output_ids"], answer["meta_info"]["weight_version"]))
        except BaseException as error:
            self.errors.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def test_twenty_syncs_under_load(urls):
    models = [new_model(21), new_model(22)]
    publisher = make_publisher(urls, models[0], canary=False, config=SyncConfig(timeout_s=20))
    load = Load(urls, 6)
    try:
        wait_until(lambda: load.finished.qsize() > 0)
        seconds = []
        for version in range(1, 21):
            publisher_model = models[version % 2]
            seconds.append(publisher.publish(version, iter(named(publisher_model))).seconds)
            assert [EngineControl(url, timeout_s=5).weight_version() for url in urls] == [str(version)] * 2
            time.sleep(0.03)
        served = load.finished.qsize()
        wait_until(lambda: load.finished.qsize() > served + 4)
    finally:
        load.stop()
        publisher.close()
    assert not load.errors and load.spanning > 5
    assert max(worst_difference(url, models[0]) for url in urls) < 1e-4
    print(f"syncs under load: first {seconds[0]:.3f} s, then {sum(seconds[1:]) / 19:.3f} s; {load.spanning} answers over several")
    _, tokens, version = list(load.finished.queue)[-1]
    assert version == "20" and len(tokens) == 45
    assert all(score <= 0 for score in reference_scores(models[0], [tokens])[0])


def test_canary_due_by_the_calendar(urls):
    """A model whose trainer scores are wrong passes until the canary is due."""
    url = urls[0]
    sent, claimed = new_model(31), new_model(32)
    publisher = make_publisher([url], claimed, config=replace(small_config(), canary_first=0, canary_every=3))
    try:
        for version in (1, 2):
            publisher.publish(version, iter(named(sent)))
        with pytest.raises(CanaryError, match=r"weight sync 3, phase canary"):
            publisher.publish(3, iter(named(sent)))
    finally:
        publisher.close()


@pytest.mark.parametrize(("transport", "num_before"), [("broadcast", 0), ("stream", 0), ("stream", 1), ("ipc", 0), ("ipc", 1)])
def test_an_engine_killed_during_the_broadcast_is_named_in_time(urls, transport, num_before):
    """``num_before``: publications that went well, after which a stream goes on without asking."""
    shared = shared_engines()
    model = new_model(41)
    publisher = make_publisher(urls, model, config=small_config(timeout_s=8), transport=transport)
    for version in range(num_before):
        publisher.publish(version, iter(named(model)))

    def killing() -> Iterator[tuple[str, torch.Tensor]]:
        for index, item in enumerate(named(model)):
            if index == len(named(model)) // 2:
                shared.engines[1].process.kill()
            yield item

    try:
        began = time.monotonic()
        phase = "engine side, phase load" if transport == "ipc" else f"engine side, stage 0, phase {transport}, chunk"
        with pytest.raises(SyncError, match=phase) as caught:
            publisher.publish(7, killing())
        assert time.monotonic() - began < 12
        assert urls[1] in str(caught.value) and caught.value.engines == (urls[1],)
        assert httpx.get(f"{urls[0]}/server_info", timeout=10).json()["paused"]
        began = time.monotonic()
        publisher.close()
        assert time.monotonic() - began < 12
        with pytest.raises(SyncError, match=f"phase model: .*{urls[1]}.*ConnectError"):
            make_publisher(urls, model).publish(8, iter(named(model)))
    finally:
        publisher.close()
        stop_shared_engines()


def later_rank(rank: int, store: str, urls: list[str], answers) -> None:
    """One of two stages: a publication that goes well, then one in which a tensor of the last stage has another shape."""
    join_stages(rank, store)
    model = new_model(51)
    place = PublisherPlace(stage=rank, num_stages=2, is_sender=True, is_lead=rank == 0, rank=rank)
    seats = Seats(by_engine={0: [0], 1: [1]}, spread=lambda buffer, stage: dist.broadcast(buffer, src=stage))
    publisher = make_publisher(urls, model, place=place, share=share, transport="ipc", seats=seats)
    tensors = half(named(model), rank)
    publisher.publish(1, iter(tensors))
    odd = [(name, tensor[:-1] if name == LAST_STAGE_TENSOR else tensor) for name, tensor in tensors]
    try:
        publisher.publish(2, iter(odd))
        answers.put((rank, "went well"))
    except SyncError as error:
        answers.put((rank, str(error)))
    publisher.close()
    dist.barrier()
    dist.destroy_process_group()


def test_a_stage_that_fails_later_holds_up_no_other(urls, tmp_path):
    context = mp.get_context("spawn")
    answers = context.Queue()
    arguments = (str(tmp_path / "store"), urls, answers)
    second = context.Process(target=later_rank, args=(1, *arguments), daemon=True)
    second.start()
    try:
        began = time.monotonic()
        later_rank(0, *arguments)
        got = dict(answers.get(timeout=30) for _ in range(2))
        assert time.monotonic() - began < 60
    finally:
        second.join(15)
        second.kill()
    assert all(f"stage 1, phase check: tensor {LAST_STAGE_TENSOR} has shape" in got[rank] for rank in range(2)), got
