"""Megatron in a process of its own: it takes seconds to import, in which the weights can move.

The process is a fork, so that nothing is imported twice. It builds the model's skeleton, says where Megatron has every
parameter, writes the description of a checkpoint when it is asked to, and ends with its parent.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from converters.items import Item
from converters.places import GlobalTensor, Places, disagreements
from rlx.models.architecture import Architecture

_MAX_SHOWN = 20
_END_SECONDS = 5.0


class Books:
    """What Megatron has to say about a checkpoint of ``arch``. ``check`` comes first and waits for its import."""

    def __init__(self, arch: Architecture) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_keep, args=(other, self._connection, arch), daemon=True)
        self._process.start()
        other.close()

    def check(self, ours: Places) -> None:
        """ValueError names the parameters that Megatron stores elsewhere than the rule says."""
        theirs: Places = self._answer()
        differing = list(disagreements(ours, theirs))
        if differing:
            more = f"\n  and {len(differing) - _MAX_SHOWN} more" if len(differing) > _MAX_SHOWN else ""
            shown = "\n  ".join(differing[:_MAX_SHOWN])
            raise ValueError(f"this Megatron stores parameters elsewhere than the converter's rule says:\n  {shown}{more}")

    def describe(self, folder: Path, tensors: Mapping[str, GlobalTensor], files: Mapping[str, Sequence[Item]]) -> None:
        """Write what makes the item files in ``folder`` a checkpoint."""
        self._connection.send((folder, tensors, files))
        self._answer()

    def __enter__(self) -> Books:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        if error[0] is not None:
            self._process.terminate()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            answer, failure = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process that imports Megatron ended with status {self._process.exitcode}") from None
        if isinstance(failure, OSError | ValueError):
            raise failure
        if failure is not None:
            raise RuntimeError(f"in the process that imports Megatron:\n{failure}")
        return answer


def _keep(connection: Connection, parents: Connection, arch: Architecture) -> None:
    """The process. It ends when the parent closes its end of the connection, or is gone."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with suppress(BrokenPipeError):
        try:
            without_compiler()
            skeleton = importlib.import_module("converters.skeleton").skeleton(arch)
            connection.send((skeleton.pieces, None))
            folder, tensors, files = connection.recv()
            importlib.import_module("converters.description").write_description(folder, tensors, files, skeleton)
            connection.send((None, None))
        except EOFError:
            return  # nothing to describe
        except (OSError, ValueError) as error:
            connection.send((None, error))
        except Exception:
            connection.send((None, traceback.format_exc()))


def without_compiler() -> None:
    """Megatron decorates functions with ``torch.compile`` on import, which loads the whole compiler; none of them runs here."""

    def keep(function: Any = None, **options: Any) -> Any:
        return keep if function is None else function

    compiler: Any = torch
    compiler.compile = keep
