"""Runs inside an engine: takes weights off a broadcast group or out of memory that the trainer shares, at the speed of the wire.

SGLang loads this package by ``--custom-weight-loader rlx_receiver.load`` and calls ``load`` for requests to
``/update_weights_from_tensor`` that name it; it knows torch and nothing else, since servers may live in another environment
than rlx. The name of the one tensor in such a request is a text (JSON) that says what to do: ``group`` and ``handover`` have the
two kinds.

Nothing is raised: an exception would end the server. The trainer hears in another way how it went: over the group, or in the
flags beside the shared memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from . import group, handover
from .buckets import Model


def load(model: Model, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Do what the request asks. ``named_tensors`` is one pair: the request, and the memory that it speaks of or nothing."""
    [(text, memory)] = named_tensors
    request = json.loads(text)
    with torch.no_grad():
        if "flags" in request:
            handover.take(model, memory, request)
        else:
            group.take(model, request)
