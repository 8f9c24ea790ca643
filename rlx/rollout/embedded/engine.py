"""The engine: one worker thread that owns the model, and the queue through which everybody else reaches it.

The worker consumes commands (``_inbox``) and sequences, produces futures, waits on ``_wake`` when there is nothing to do,
and stops on ``close``. Between two forward passes it handles every command that has come. Commands that change weights
are *exclusive*: they run when nothing is in flight, or at once while generation is paused, and whatever arrives meanwhile
is held back. Nothing here knows HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from rlx.obs.log import current_phase, log_failure, phase
from rlx.rollout.embedded.batch import DecodeBatch
from rlx.rollout.embedded.model import LanguageModel
from rlx.rollout.embedded.sequence import Sequence

PAUSE_MODES = ("abort", "retract", "in_place")
# Requests of one wave arrive a fraction of a millisecond apart: waiting for the wave to end saves many small passes.
_LULL_S = 0.002
_MAX_GATHER_S = 0.02


@dataclass(slots=True, eq=False)
class _Ticket:
    """The sequences of one request; ``future`` is set when all of them are done."""

    sequences: list[Sequence]
    future: Future[None]
    left: int


class Engine:
    """Generates and scores with ``model``. Every public method may be called from any thread and returns at once."""

    def __init__(self, model: LanguageModel, max_running: int, on_failure: Callable[[], None] = lambda: None) -> None:
        self.model = model
        self.on_failure = on_failure
        self.info = model.info
        self.weight_version = "default"
        self.max_running = max_running
        self.paused = False
        self.released = False
        self.step_delay_s = 0.0
        self.failure: Exception | None = None
        self._batch = DecodeBatch(model)
        self._waiting: deque[Sequence] = deque()
        self._held: deque[Sequence] = deque()
        self._exclusive: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._tickets: dict[Sequence, _Ticket] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._phases = ExitStack()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called by others ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def in_flight(self) -> int:
        """Sequences that are not answered yet, held ones included."""
        return len(self._tickets)

    @property
    def is_idle(self) -> bool:
        """Nothing has key/values, and nothing will before the next request or ``resume``."""
        return not len(self._batch) and (self.paused or len(self._tickets) == len(self._held))

    def submit(self, sequences: list[Sequence]) -> Future[None]:
        """Queue the sequences of one request; the future is set when all of them are done, aborted or in error."""
        ticket = _Ticket(sequences, Future(), len(sequences))

        def accept() -> None:
            for sequence in sequences:
                self._tickets[sequence] = ticket
            (self._held if self.paused or self._exclusive else self._waiting).extend(sequences)

        self._post(accept)
        return ticket.future

    def call[R](self, function: Callable[[], R]) -> Future[R]:
        """Run ``function`` on the worker between two forward passes."""
        future: Future[R] = Future()
        self._post(lambda: _fulfil(future, function))
        return future

    def call_exclusive[R](self, function: Callable[[], R], abort_running: bool = False) -> Future[R]:
        """Run ``function``, which may change weights, when nothing is in flight or generation is paused. Later requests
        wait behind it; ``abort_running`` aborts those in flight first. Sequences that were paused forget their key/values."""
        future: Future[R] = Future()

        def accept() -> None:
            self._exclusive.append((future, function))
            if abort_running:
                self._abort([*self._batch.sequences, *self._waiting])

        self._post(accept)
        return future

    def pause(self, mode: str) -> Future[None]:
        """Stop generating. abort: answer what is in flight; retract, in_place: let it go on after ``resume``, without or
        with its key/values. New requests are held until then."""

        def accept() -> None:
            self.paused = True
            if mode == "abort":
                self._abort([*self._batch.sequences, *self._waiting])
            elif mode == "retract":
                self._waiting.extendleft(reversed(self._batch.retract()))

        return self.call(accept)

    def resume(self) -> Future[None]:
        """Undo ``pause``."""

        def accept() -> None:
            self.paused = False

        return self.call(accept)

    def relabel(self, version: str) -> None:
        """On the worker: give the weights another name. What is written so far keeps the old one."""
        for sequence in self._tickets:
            if sequence.output_ids:
                sequence.label(self.weight_version)
        self.weight_version = version

    def abort(self, rid: str | None) -> Future[None]:
        """Answer the sequences of this request id (exactly), or all of them, with what they have so far."""
        return self.call(lambda: self._abort([s for s in self._tickets if rid is None or s.rid == rid]))

    def close(self) -> None:
        """Answer everything in flight as aborted and end the worker after the forward pass it is in."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the worker's end; False when it is still busy after ``timeout_s`` seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closing or self.failure is not None:
                raise RuntimeError(
                    "the engine is shutting down" if self.failure is None else f"the engine failed: {self.failure}"
                )
            self._inbox.append(command)
            self._wake.notify()

    # -- the worker ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._turn()
        except Exception as error:  # the thread's edge: recorded, told to every waiting request, and fatal to the process
            log_failure(error)
            with self._wake:
                self.failure = error
        finally:
            self._end()

    def _turn(self) -> None:
        self._wait_for_work()
        while self._inbox:
            self._inbox.popleft()()
        self._run_exclusive()
        if self.paused or self._closing:
            return
        if not self._exclusive and self._held:
            self._waiting.extend(self._held)
            self._held.clear()
        if self._waiting and len(self._batch) < self.max_running:
            self._enter("serve")
            room = self.max_running - len(self._batch)
            self._settle(self._batch.admit([self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]))
        elif len(self._batch):
            self._settle(self._batch.step())
        if self.step_delay_s:
            time.sleep(self.step_delay_s)

    def _wait_for_work(self) -> None:
        with self._wake:
            if self._idle():
                self._wake.wait_for(lambda: self._inbox or self._closing)
                began = time.monotonic()
                seen = 0
                while seen != len(self._inbox) and time.monotonic() - began < _MAX_GATHER_S and not self._closing:
                    seen = len(self._inbox)
                    self._wake.wait(_LULL_S)

    def _idle(self) -> bool:
        runnable = len(self._batch) or self._waiting or self._held
        return not self._inbox and not self._closing and not self._exclusive_ready() and (self.paused or not runnable)

    def _exclusive_ready(self) -> bool:
        return bool(self._exclusive) and (self.paused or not (len(self._batch) or self._waiting))

    def _run_exclusive(self) -> None:
        while self._exclusive_ready() and not self._closing:
            self._enter("weight update")
            # Paused in place: no key or value may outlive the weights that made it.
            self._waiting.extendleft(reversed(self._batch.retract()))
            _fulfil(*self._exclusive[0])
            self._exclusive.popleft()

    def _abort(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.abort()
        self._batch.drop_done()
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.done)
        self._held = deque(sequence for sequence in self._held if not sequence.done)
        self._settle(sequences)

    def _settle(self, done: list[Sequence]) -> None:
        """Stamp finished sequences and answer the requests that are complete by them."""
        for sequence in done:
            sequence.label(self.weight_version)
            ticket = self._tickets.pop(sequence)
            ticket.left -= 1
            if ticket.left == 0:
                with suppress(InvalidStateError):  # its client went away
                    ticket.future.set_result(None)

    def _enter(self, name: str) -> None:
        if current_phase().name != name:
            self._phases.close()
            self._phases.enter_context(phase(name))

    def _end(self) -> None:
        """Answer everybody who still waits. Touches no key/values: after a failure the device may be unusable."""
        with self._wake:
            self._closing = True
            commands = list(self._inbox)
            self._inbox.clear()
        self._batch = DecodeBatch(self.model)
        for command in commands:
            command()
        reason = "the engine is shutting down" if self.failure is None else f"the engine failed: {self.failure}"
        for future, _ in self._exclusive:
            if not future.cancelled():
                future.set_exception(RuntimeError(reason))
        for sequence in self._tickets:
            sequence.abort(reason)
            if self.failure is not None:
                sequence.error = reason
        self._settle(list(self._tickets))
        if self.failure is not None:
            self.on_failure()


def _fulfil[R](future: Future[R], function: Callable[[], R]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except (ValueError, RuntimeError, OSError) as error:  # handed to whoever asked; anything else ends the worker
        future.set_exception(error)
