"""Checkpoints read: what their pickles say, where plain data lie, and what is not plain."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from converters.plan import Piece, Position
from converters.storage import Plain, StoredCheckpoint, read_plainly

TENSORS = {
    "whole": torch.arange(48, dtype=torch.float32).view(6, 8).bfloat16(),
    "turned": torch.arange(48, dtype=torch.float32).view(8, 6).t(),
    "other type": torch.arange(48, dtype=torch.float64).view(6, 8),
}


class Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def piece(key: str, offset: Position = (0, 0), shape: Position = (6, 8)) -> Piece:
    return Piece(key=key, global_shape=(6, 8), offset=offset, shape=shape, num_prepended=0)


def test_pickles_name_and_run_nothing(tmp_path: Path) -> None:
    harm = pickle.dumps({"a": [1, Harm(tmp_path / "harm")]})
    found = read_plainly(io.BytesIO(harm))
    assert found["a"][0] == 1 and isinstance(found["a"][1], Plain) and not (tmp_path / "harm").exists()
    sizes, dtype = read_plainly(io.BytesIO(pickle.dumps((torch.Size([2, 3]), torch.bfloat16))))
    assert sizes == (2, 3) and dtype.__name__ == "bfloat16"
    with pytest.raises(pickle.UnpicklingError):
        read_plainly(io.BytesIO(b"no pickle"))


def test_plain_data_are_found_where_torch_saved_them(tmp_path: Path) -> None:
    dcp.save(dict(TENSORS), checkpoint_id=str(tmp_path), no_dist=True)
    stored = StoredCheckpoint(tmp_path)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in stored.tensors.items()} == {
        "whole": ((6, 8), "bfloat16"), "turned": ((6, 8), "float32"), "other type": ((6, 8), "float64")
    }  # fmt: skip
    extents = stored.extents(piece("whole", (2, 0), (3, 8)))
    assert extents is not None and len(extents) == 1
    extent = extents[0]
    expected = TENSORS["whole"][2:5].contiguous().view(torch.uint8).numpy().tobytes()
    assert os.pread(extent.descriptor, extent.length, extent.position) == expected
    assert stored.extents(piece("turned")) is None and stored.extents(piece("other type")) is None
    stored.close()


def test_broken_metadata_is_named(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        StoredCheckpoint(tmp_path)
