"""What the sync tests share: tiny models, real engine processes and an independent reference for their scores."""

from __future__ import annotations

import atexit
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlx.config.schema import SyncConfig
from rlx.models.hf.companions import Companions
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import PublisherPlace, Share
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.disk import SyncFolder
from rlx.sync.transports.handover import Seats
from rlx.types.precision import FP32

VOCAB = 101
REPOSITORY = Path(__file__).parents[2]


def new_model(seed: int) -> LlamaForCausalLM:
    """Random weights in which every tensor matters (norms too)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if parameter.dim() == 1 else torch.randn_like(parameter) * 0.2)
    return model


def named(model: LlamaForCausalLM) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach()) for name, tensor in model.state_dict().items()]


def shapes(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named(model)}


def half(tensors: list[tuple[str, Tensor]], stage: int) -> list[tuple[str, Tensor]]:
    """The share of one of two pipeline stages."""
    middle = len(tensors) // 2
    return tensors[:middle] if stage == 0 else tensors[middle:]


@torch.no_grad()
def reference_scores(model: LlamaForCausalLM, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    rows = []
    for tokens in sequences:
        logits = model(torch.tensor([list(tokens)])).logits[0, :-1].double()
        rows.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist())
    return rows


def worst_difference(url: str, model: LlamaForCausalLM) -> float:
    """How far an engine's scores of fresh random sequences are from transformers'."""
    sequences = [[random.randrange(VOCAB) for _ in range(random.randint(2, 33))] for _ in range(3)]
    control = EngineControl(url, timeout_s=30)
    scores = [control.score(tokens) for tokens in sequences]
    control.close()
    pairs = zip(chain(*scores), chain(*reference_scores(model, sequences)), strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)


@dataclass
class EngineProcess:
    """One ``rlx serve`` of its own; ``stop`` ends it by its handle."""

    process: subprocess.Popen[bytes]
    url: str = ""
    log: Path = field(default_factory=Path)
    pipe: int = -1

    def wait_ready(self, limit_s: float = 300.0) -> None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        line = self.process.stdout.readline().decode() if ready else ""
        assert line.startswith("rlx-serve ready port="), f"{line!r}; log:\n{self.log.read_text()[-3000:]}"
        self.url = f"http://127.0.0.1:{int(line.split('=')[1])}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1
        if self.process.stdout is not None:
            self.process.stdout.close()


class EnginePair:
    """Two engines that several test files share: starting them costs more than most tests."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rlx-sync-")
        self.folder = Path(self._folder.name)
        self.engines = start_engines(self.folder, 2, new_model(0))

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    def stop(self) -> None:
        for engine in self.engines:
            engine.stop()
        self._folder.cleanup()


_running: list[EnginePair] = []


def shared_engines() -> EnginePair:
    """The pair, started on first use and again after ``stop_shared_engines``; both on the weights of ``new_model(0)``."""
    if not _running:
        _running.append(EnginePair())
        atexit.register(stop_shared_engines)
    for url in _running[0].urls:
        reload_from_disk(url, _running[0].folder)
    return _running[0]


def stop_shared_engines() -> None:
    while _running:
        _running.pop().stop()


def start_engines(folder: Path, count: int, model: PreTrainedModel) -> list[EngineProcess]:
    model.save_pretrained(folder / "model")
    engines = []
    for index in range(count):
        log = folder / f"engine-{index}.log"
        ours, theirs = os.pipe()[::-1]  # the engine ends when our end of the pipe is gone, however this process ends
        command = [sys.executable, "-m", "rlx.cli.serve", "--model", str(folder / "model"), "--port", "0", "--dtype", "fp32"]
        command += ["--threads", "1", "--weight-timeout-s", "20", "--parent-pipe", str(theirs)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs],
            )
        os.close(theirs)
        engines.append(EngineProcess(process=process, log=log, pipe=ours))
    try:
        for engine in engines:
            engine.wait_ready()
    except BaseException:
        for engine in engines:
            engine.stop()
        raise
    return engines


def make_publisher(
    urls: Sequence[str],
    model: LlamaForCausalLM,
    *,
    place: PublisherPlace | None = None,
    share: Share | None = None,
    config: SyncConfig | None = None,
    canary: bool = True,
    folder: Path | None = None,
    transport: str = "stream",
    seats: Seats | None = None,
) -> Publisher:
    """A publisher of ``model``: its scores are the canary's reference, its tensors those the search compares with.
    With ``folder`` weights go through it: ``folder``/sync, beside the model in ``folder``/model."""
    place = place or PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)

    def export() -> Iterator[tuple[str, Tensor]]:
        tensors = named(model)
        return iter(tensors if place.num_stages == 1 else half(tensors, place.stage))

    spec = CanarySpec(
        vocab_size=VOCAB,
        seed=5,
        precision=FP32,
        score_on_trainer=lambda sequences, images: reference_scores(model, sequences),
        export=export,
    )
    target = PublisherTarget(
        endpoints=tuple(Endpoint(url=url, index=index) for index, url in enumerate(urls)),
        expected=shapes(model),
        backend="gloo",
        device=torch.device("cpu"),
        transport="disk" if folder else transport,
        seats=seats or Seats(by_engine={index: [place.rank] for index in range(len(urls))}),
        folder=SyncFolder(path=folder / "sync", companions=Companions.of(folder / "model")) if folder else None,
    )
    config = config or small_config()
    return Publisher(place, target, config, share or (lambda text: [text]), spec if canary else None)


def small_config(timeout_s: float = 20.0) -> SyncConfig:
    """Limits that cut the tiny model into several chunks of both kinds."""
    return SyncConfig(bucket_bytes=9000, flatten_below_bytes=2500, timeout_s=timeout_s, canary_first=10**6)


def reload_from_disk(url: str, folder: Path) -> None:
    """Back to the weights on disk, running, whatever a test did to the engine."""
    control = EngineControl(url, timeout_s=20)
    control.update_weights_from_disk(str(folder / "model"), "default")
    control.resume()
    control.close()


def wait_until(condition, limit_s: float = 15.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "condition not reached"
        time.sleep(0.01)
