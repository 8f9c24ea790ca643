"""Torch and Megatron in a process of their own: they take seconds to import, in which the weights can move.

The process is a fork, so that nothing is imported twice. It builds the model's skeleton, says where Megatron has every
parameter, writes the description of a checkpoint when it is asked to, and ends with its parent. Nothing here imports torch:
a conversion that changes no bit does without it.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process starts before anything is imported that it can do without
    from converters.items import Item
    from converters.places import GlobalTensor, Places
    from rlx.arch.architecture import Architecture

_END_SECONDS = 5.0


class Books:
    """What Megatron has to say about a checkpoint. ``open`` comes first, then ``places``, which waits for the import."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_keep, args=(other, self._connection), daemon=True)
        self._process.start()
        other.close()

    def open(self, arch: Architecture) -> None:
        """Say of which model."""
        self._send(arch)

    def places(self) -> Places:
        """Where Megatron has every parameter."""
        theirs: Places = self._answer()
        return theirs

    def describe(self, folder: Path, tensors: Mapping[str, GlobalTensor], files: Mapping[str, Sequence[Item]]) -> None:
        """Write what makes the item files in ``folder`` a checkpoint."""
        self._send((folder, tensors, files))
        self._answer()

    def __enter__(self) -> Books:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.terminate()  # it has answered, or nobody waits for its answer
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _send(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # waiting for the answer tells what became of the process
            self._connection.send(message)

    def _answer(self) -> Any:
        try:
            answer, failure = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"the process that imports Megatron ended with status {self._process.exitcode}") from None
        if isinstance(failure, OSError | ValueError):
            raise failure
        if failure is not None:
            raise RuntimeError(f"in the process that imports Megatron:\n{failure}")
        return answer


def _keep(connection: Connection, parents: Connection) -> None:
    """The process. It ends when the parent closes its end of the connection, or is gone."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with suppress(BrokenPipeError):
        try:
            _hasten()
            without_compiler()
            importlib.import_module("torch").set_num_threads(1)
            importlib.import_module("rlx.processes.device").take_device("cpu", 0)
            describe = importlib.import_module("converters.description").write_description
            skeleton = importlib.import_module("converters.skeleton").skeleton(connection.recv())
            connection.send((skeleton.pieces, None))
            folder, tensors, files = connection.recv()
            describe(folder, tensors, files, skeleton)
            connection.send((None, None))
        except (EOFError, ConnectionResetError):
            return  # nothing to describe
        except (OSError, ValueError) as error:
            connection.send((None, error))
        except Exception:
            connection.send((None, traceback.format_exc()))


def _hasten() -> None:
    """Make the imports quicker, which are the longest way through a conversion: nothing is collected, and an extra of no use
    here counts as missing."""
    gc.disable()
    sys.modules.setdefault("torch.utils.tensorboard", None)  # type: ignore[arg-type]


def without_compiler() -> None:
    """Megatron decorates functions with ``torch.compile`` on import, which loads the whole compiler; none of them runs here."""

    def keep(function: Any = None, **options: Any) -> Any:
        return keep if function is None else function

    importlib.import_module("torch").compile = keep  # type: ignore[attr-defined]
