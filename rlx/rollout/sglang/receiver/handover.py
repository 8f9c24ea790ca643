"""Weights out of memory that a trainer rank on the same device shares: an area in which bucket after bucket lies.

The request is for a whole publication:

    {"flags": PATH, "reader": K, "book": NAME, "known": N, "limit_s": S}

and comes with the area. ``flags`` say how many buckets are filled; where each lies and what is in it stands in a file beside
them the first time (a line of JSON a bucket: [offset, [[name, dtype, shape, start], ...]]) and is remembered under the book's
name, from which on ``known`` says of how many.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

import torch
from torch import Tensor

from .buckets import Bucket, Model, addresses_of, entries_of, forget_images, tell_once
from .flags import Flags, wait_until

# Of the last book: where each bucket lies in the area, and the bucket.
_books: dict[str, list[tuple[int, Bucket]]] = {}


def take(model: Model, area: Tensor, request: dict[str, Any]) -> None:
    """Copy every bucket in as it comes, and say how it went."""
    try:
        flags = Flags(request["flags"])
    except OSError as error:  # the trainer has gone, and its files with it
        print(f"rlx: the trainer's flags cannot be read: {error}", file=sys.stderr, flush=True)
        return
    number = request["reader"]
    flags.enter(number)
    try:
        problem = _take(model, area, request, flags)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        print(f"rlx: {problem}", file=sys.stderr, flush=True)
        _books.pop(request["book"], None)
    flags.leave(number, problem)
    flags.close()


def _take(model: Model, area: Tensor, request: dict[str, Any], flags: Flags) -> str:
    name, is_new = request["book"], not request["known"]
    if name not in _books or is_new:
        _books.clear()
    book = _books.setdefault(name, [])
    if len(book) != request["known"]:
        return f"{request['known']} buckets were announced, {len(book)} are known"
    addresses = addresses_of(model)
    if is_new:
        with open(f"{request['flags']}.book", encoding="utf-8") as lines:
            problem = _take_all(model, area, request, flags, addresses, lines)
    else:
        tell_once(name, [bucket for _, bucket in book])
        problem = _take_all(model, area, request, flags, addresses, None)
    return problem


def _take_all(
    model: Model, area: Tensor, request: dict[str, Any], flags: Flags, addresses: tuple[int, ...], lines: TextIO | None
) -> str:
    book, reader = _books[request["book"]], request["reader"]
    for number in range(sys.maxsize):
        late = wait_until(
            lambda number=number: flags.filled > number or flags.is_complete or flags.gave_up,  # type: ignore[misc]
            lambda: flags.writer,
            request["limit_s"],
        )
        if late is not None:
            return f"of the trainer, after {number} buckets: {late}"
        if flags.gave_up:
            return f"the trainer gave up after {number} buckets"
        if flags.filled <= number:
            break
        if lines is not None:
            offset, rows = json.loads(lines.readline())
            book.append((offset, Bucket(entries_of(rows))))
        offset, bucket = book[number]
        forget_images([bucket])
        received = area[offset : offset + bucket.num_bytes]
        try:
            bucket.load(model, received) if lines is not None else bucket.fill(model, received, addresses)
        except Exception as error:
            return f"{type(error).__name__}: {error} (in {bucket.names})"
        if area.is_cuda:
            torch.cuda.current_stream(area.device).synchronize()
        flags.take(reader, number + 1)
    return "" if len(book) == number else f"{number} buckets came, {len(book)} were announced"
