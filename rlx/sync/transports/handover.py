"""The lane of engines on the trainer ranks' own devices: every rank brings all weights onto its device, and the engine rank that
shares the device copies them from there.

Handles never point to another GPU: memory that torch_memory_saver mapped cannot be filled from there. A rank has one area, of
two slots; while an engine copies one bucket, the next is gathered into the other slot. A tensor larger than a slot takes the
whole area. CUDA IPC on GPUs, a segment of shared memory on hosts; both sides wait for each other by
``rlx.rollout.sglang.receiver.flags``. One request a publication: the rank on the device of an engine's first rank makes it, with
the texts of all that serve the engine.

The ranks of a stage have its tensors (they gather them together); those of other stages get whole buckets by a broadcast along
the pipeline. What is in each bucket they hear the first time, and remember.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from rlx.config.schema import SyncConfig
from rlx.obs.log import logger
from rlx.rollout.sglang.receiver.flags import Flags, wait_until
from rlx.rollout.sglang.segments import own_segments
from rlx.rollout.sglang.shared_tensors import RECEIVER, receiver_text
from rlx.sync.chunks import tensor_info
from rlx.sync.collective_phase import Share
from rlx.sync.errors import SyncError
from rlx.sync.fanout import describe, failures, start, unwell
from rlx.sync.group import GRACE_S, Engine
from rlx.sync.transports.area import ALIGNMENT, Bucket, OpenBucket, aligned
from rlx.types.weights import TensorInfo

Spread = Callable[[Tensor, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Which trainer rank serves which engine rank: ``by_engine[index][t]`` is on the device of the engine's rank ``t``.

    ``spread`` broadcasts a buffer from this rank's peer in a pipeline stage to those in the others; None where there is one
    stage. ``weight_bytes`` is the width of a weight.
    """

    by_engine: Mapping[int, Sequence[int]]
    spread: Spread | None = None
    weight_bytes: int = 4


@dataclass(slots=True)
class _Reader:
    """An engine rank that this trainer rank serves. ``lost`` says why it is not waited for any more."""

    engine: Engine
    rank: int
    number: int
    lost: str = ""

    def __str__(self) -> str:
        return f"{self.engine.url}, rank {self.rank}" if self.engine.endpoint.tp > 1 else self.engine.url


class Handover:
    """One trainer rank's side. ``begin``, ``send`` for each stage in order, ``finish``; all collective over the trainer ranks."""

    def __init__(self, engines: Sequence[Engine], seats: Seats, rank: int, device: torch.device, config: SyncConfig) -> None:
        self._seats, self._device, self._limit_s = seats, device, config.timeout_s
        self._bucket_bytes = self._slot_bytes = aligned(config.bucket_bytes)
        pairs = [
            (engine, each) for engine in engines for each, by in enumerate(seats.by_engine[engine.endpoint.index]) if by == rank
        ]
        self._readers = [_Reader(engine, each, number) for number, (engine, each) in enumerate(pairs)]
        self._book, self._stages = "", dict[int, list[Bucket]]()
        self._area: Tensor | None = None
        self._flags: Flags | None = None
        self._watched: dict[str, tuple[Flags, int]] = {}  # by engine that another rank asks: where that rank says if it failed
        self._asked: dict[str, Future[None]] = {}
        self._lines: TextIO | None = None
        self._num_filled = 0
        self._empty: Callable[[], None] | None = None  # while buckets are filled: the one that is open leaves
        self._due = [0, 0]  # by slot: how many buckets must have been taken before it is written to again

    def refusal(self) -> str | None:
        """Why memory of this rank's GPU cannot be shared here; None where it can."""
        if self._device.type != "cuda":
            return None
        try:
            receiver_text({}, torch.empty(1, dtype=torch.uint8, device=self._device))
        except RuntimeError as error:
            return f"{error}".splitlines()[0]
        return None

    # A publication

    def begin(self, sizes: Sequence[int], repeats: bool) -> list[list[object]]:
        """Make the area, for tensors of these ``sizes`` (elements), and the flags.

        Returns what the others need of this rank, for ``ask``. ``repeats``: the buckets are those of the last publication.
        """
        self._release()
        if not (repeats and self._stages):
            self._book, self._stages = "", {}
        known = sum(map(len, self._stages.values()))
        self._num_filled, self._due = 0, [0, 0]
        each = [aligned(self._seats.weight_bytes * size) for size in sizes]
        self._slot_bytes = min(self._bucket_bytes, max(ALIGNMENT, sum(each)))
        # Gathered, a vocabulary has some rows more, of padding.
        num_bytes = max(2 * self._slot_bytes, aligned(max(each) * 65 // 64))
        if self._device.type == "cuda":
            self._area = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        elif self._readers:
            self._area = own_segments().holding(torch.empty(num_bytes, dtype=torch.uint8))
        else:
            self._area = torch.empty(num_bytes, dtype=torch.uint8)
        if not self._readers:
            return []
        self._flags = Flags.create(str(own_segments().new_path()), len(self._readers))
        if not known:
            self._book = f"{self._flags.path}-{secrets.token_hex(4)}"
            self._lines = Path(f"{self._flags.path}.book").open("x", encoding="utf-8")  # noqa: SIM115, lives as long as the area
        texts: list[list[object]] = []
        for reader in self._readers:
            request = {
                "flags": self._flags.path,
                "reader": reader.number,
                "book": self._book,
                "known": known,
                "limit_s": self._limit_s,
            }
            text = receiver_text(request, self._area)
            texts.append([reader.engine.url, reader.rank, text, self._flags.path, reader.number])
        return texts

    def ask(self, texts: Sequence[Sequence[Sequence[object]]], version: int) -> None:
        """Ask the engines whose first rank is on this rank's device. ``texts``: what ``begin`` gave on every rank."""
        by_engine: dict[str, dict[int, Sequence[object]]] = {}
        for url, number, *rest in (row for rows in texts for row in rows):
            by_engine.setdefault(str(url), {})[int(str(number))] = rest
        for reader in self._readers:
            rows = by_engine[reader.engine.url]
            if reader.rank == 0:
                call = partial(
                    reader.engine.control.update_weights_from_tensor,
                    [str(rows[number][0]) for number in range(reader.engine.endpoint.tp)],
                    load_format=RECEIVER,
                    flush_cache=False,
                    weight_version=str(version),
                )
                self._asked[reader.engine.url] = asked = start(call)
                asked.add_done_callback(partial(self._tell_others, reader.number))
            elif reader.engine.url not in self._watched:
                _, path, number = rows[0]
                try:
                    self._watched[reader.engine.url] = Flags(str(path)), int(str(number))
                except OSError:  # that rank is on another machine
                    continue

    def send(self, stage: int, tensors: Iterator[tuple[str, Tensor]] | None, share: Share) -> tuple[TensorInfo, ...]:
        """One stage's buckets, from its ``tensors`` where the stage is this rank's; what was sent. ``share`` all-gathers a text.

        Raises what went wrong on this rank; an engine that fails is not waited for any more and told of by ``finish``.
        """
        known = self._stages.get(stage)
        error: Exception | None = None
        if tensors is not None:
            sent: list[Bucket] = []
            try:
                self._fill_all(stage, tensors, known, share, sent)
            except Exception as caught:
                error = caught
            if known is None:
                share(json.dumps("end"))
            elif error is not None:  # the other stages wait for as many buckets as the last time
                for bucket in known[len(sent) :]:
                    self._spread(stage, bucket)
            elif error is None and len(sent) != len(known):
                error = SyncError(f"{len(sent)} buckets instead of the last publication's {len(known)}")
        else:
            sent = self._receive_all(stage, known, share)
        if error is not None:
            raise error
        self._stages[stage] = sent
        return tuple(info for bucket in sent for info in bucket.infos)

    def room(self, num_bytes: int) -> Tensor | None:
        """Where to gather a tensor that takes the whole area, so that it is there already; None for smaller ones. What was filled
        before leaves. To be asked on every rank of the stage, by what gives ``send`` its tensors."""
        if self._area is None or self._empty is None or not self._slot_bytes < num_bytes <= self._area.numel():
            return None
        self._empty()
        self._wait_taken(max(self._due))
        return self._area[:num_bytes]

    def finish(self) -> None:
        """Wait until every engine rank of this rank has taken everything. SyncError names those that have not."""
        if self._flags is None:
            return
        self._flags.complete()
        for reader in self._readers:
            self._wait_for(reader, lambda flags, number: flags.is_done(number))
        gone = {reader.engine.url for reader in self._readers if reader.lost}
        asked = {url: future for url, future in self._asked.items() if url not in gone}
        found = failures(asked, self._limit_s + GRACE_S) if asked else {}
        said = [(reader, reader.lost or self._flags.problem(reader.number)) for reader in self._readers]
        problems = [f"{reader}: {text}" for reader, text in said if text]
        problems += [describe({url: error}) for url, error in found.items()]
        self._release()
        if problems:
            raise SyncError(f"engine side, phase load: {'; '.join(problems)}", sorted({*unwell(found), *gone}))

    def close(self) -> None:
        """Let the engines go that still wait; give everything back. May be called twice."""
        self._release()

    # Filling

    def _fill_all(
        self, stage: int, tensors: Iterator[tuple[str, Tensor]], known: list[Bucket] | None, share: Share, sent: list[Bucket]
    ) -> None:
        """Cut the tensors into buckets as they come."""
        bucket: OpenBucket | None = None

        def leave() -> None:
            nonlocal bucket
            full, bucket = bucket, None
            if full is not None:
                self._leave(stage, full.closed(), known, share, sent)

        self._empty = leave
        try:
            for name, tensor in tensors:
                start = None if bucket is None else bucket.place(tensor.nbytes)
                if start is None:
                    leave()
                    bucket, start = self._open(tensor.nbytes), 0
                assert bucket is not None and self._area is not None
                at = bucket.offset + start
                target = self._area[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                if target.data_ptr() != tensor.data_ptr():  # it was not gathered there
                    target.copy_(tensor.detach())
                bucket.infos.append(tensor_info(name, tensor))
                bucket.starts.append(start)
                bucket.end = start + tensor.nbytes
            leave()
        finally:
            self._empty = None

    def _open(self, num_bytes: int) -> OpenBucket:
        """The next stretch of the area that may be written to, of at least so many bytes."""
        assert self._area is not None
        if num_bytes > self._area.numel():
            raise SyncError(f"a tensor of {num_bytes} bytes does not fit into the area of {self._area.numel()}")
        if num_bytes > self._slot_bytes:
            self._wait_taken(max(self._due))
            self._due = [self._num_filled + 1] * 2
            return OpenBucket(offset=0, limit=num_bytes)
        slot = 0 if self._due[0] <= self._due[1] else 1
        self._wait_taken(self._due[slot])
        self._due[slot] = self._num_filled + 1
        return OpenBucket(offset=slot * self._slot_bytes, limit=self._slot_bytes)

    def _leave(self, stage: int, bucket: Bucket, known: list[Bucket] | None, share: Share, sent: list[Bucket]) -> None:
        """A bucket is full: to the other stages, and to the engines."""
        if known is None:
            share(bucket.line())
        elif len(sent) >= len(known) or known[len(sent)] != bucket:
            raise SyncError(f"bucket {len(sent)} holds other tensors than in the publication before")
        sent.append(bucket)
        self._spread(stage, bucket)
        self._hand_over(bucket)

    def _receive_all(self, stage: int, known: list[Bucket] | None, share: Share) -> list[Bucket]:
        """Buckets of another stage's ranks."""
        if known is not None:
            for bucket in known:
                self._receive(stage, bucket)
            return known
        found: list[Bucket] = []
        while True:
            said = {text for text in share(None) if text is not None}
            assert len(said) == 1, f"the ranks of stage {stage} do not send the same: {said}"
            line = said.pop()
            if json.loads(line) == "end":
                return found
            found.append(Bucket.read(line))
            self._receive(stage, found[-1])

    def _receive(self, stage: int, bucket: Bucket) -> None:
        taken = self._open(bucket.num_bytes)
        assert taken.offset == bucket.offset, "all ranks place buckets alike"
        self._spread(stage, bucket)
        self._hand_over(bucket)

    def _spread(self, stage: int, bucket: Bucket) -> None:
        if self._seats.spread is not None:
            assert self._area is not None
            self._seats.spread(self._area[bucket.offset : bucket.offset + bucket.num_bytes], stage)

    def _hand_over(self, bucket: Bucket) -> None:
        self._num_filled += 1
        if self._flags is None:
            return
        if self._lines is not None:
            self._lines.write(bucket.line() + "\n")
            self._lines.flush()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._flags.fill(self._num_filled)

    # Waiting

    def _wait_taken(self, count: int) -> None:
        for reader in self._readers:
            self._wait_for(reader, lambda flags, number: flags.taken(number) >= count or flags.is_done(number))

    def _wait_for(self, reader: _Reader, condition: Callable[[Flags, int], bool]) -> None:
        """Until the condition holds of a reader, or it is lost."""
        flags = self._flags
        if reader.lost or flags is None:
            return
        asked, watched = self._asked.get(reader.engine.url), self._watched.get(reader.engine.url)

        def settled() -> bool:
            failed = asked is not None and asked.done() and asked.exception() is not None
            return condition(flags, reader.number) or failed or (watched is not None and watched[0].is_lost(watched[1]))

        # Half of what others have who wait for this rank meanwhile, so that engines that are well are not lost as well.
        late = wait_until(settled, lambda: flags.reader(reader.number), self._limit_s / 2)
        if late is None and not condition(flags, reader.number):
            late = "the request failed" if asked is None else f"{asked.exception()}"
        if late is not None:
            reader.lost = late
            logger.warning("weight sync: engine %s is not waited for any more: %s", reader, late)

    def _tell_others(self, number: int, asked: Future[None]) -> None:
        """The ranks that serve the other ranks of an engine do not hear from it themselves."""
        flags = self._flags
        if asked.exception() is not None and flags is not None:
            with suppress(ValueError):  # closed meanwhile
                flags.lose(number)

    def _release(self) -> None:
        if self._flags is not None:
            if not self._flags.is_complete:
                self._flags.give_up()
            self._flags.remove()
            self._flags = None
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        for flags, _ in self._watched.values():
            flags.close()
        self._watched, self._asked = {}, {}
        for reader in self._readers:
            reader.lost = ""
        had, self._area = self._area is not None, None
        if had and self._device.type == "cuda":
            torch.cuda.ipc_collect()
