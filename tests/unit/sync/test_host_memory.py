"""Host memory that another process opens: it is the sender's own, and nothing but the sender's end takes it away."""

from __future__ import annotations

import base64
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from rlx.rollout.sglang.host_memory import open_words, path_of, shared_copy
from rlx.rollout.sglang.shared_tensors import open_bucket, share_bucket
from rlx.sync.chunks import flatten, tensor_info, unflatten
from rlx.types.weights import WeightChunk

READER = """
import sys, torch
from rlx.rollout.sglang.shared_tensors import open_bucket
buffer, infos = open_bucket(sys.stdin.read())
print(int(buffer.long().sum()), [info.name for info in infos])
"""


def bucket(*shapes: tuple[int, ...]) -> tuple[WeightChunk, torch.Tensor]:
    """A chunk of bytes and its memory."""
    tensors = tuple(torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
    infos = tuple(tensor_info(f"t{index}", tensor) for index, tensor in enumerate(tensors))
    chunk = WeightChunk(infos=infos, tensors=tensors, flattened=True)
    return chunk, shared_copy(flatten(chunk))


class _AsSGLang(pickle.Unpickler):
    """Stock servers look functions up in modules that they trust."""

    def find_class(self, module: str, name: str) -> object:
        assert (module + ".").startswith(("torch.", "types.")), (module, name)
        return super().find_class(module, name)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 4097])
def test_the_reader_sees_every_byte(size: int) -> None:
    chunk, buffer = bucket((size,), (3, 5))
    text = share_bucket(buffer, chunk.infos)
    for opened in (open_bucket(text)[0], _AsSGLang(io.BytesIO(base64.b64decode(text))).load()["flattened_tensor"]):
        assert opened.dtype == torch.uint8 and torch.equal(opened, buffer)
        assert all(torch.equal(*pair) for pair in zip(unflatten(opened, chunk.infos), chunk.tensors, strict=True))


def test_another_process_opens_it_and_no_helper_has_to_live() -> None:
    chunk, buffer = bucket((70_000,), (8,))
    text = share_bucket(buffer, chunk.infos)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, "-c", READER], input=text, text=True, capture_output=True, timeout=120, env=env)
    assert done.stdout.split(maxsplit=1) == [str(int(buffer.long().sum())), "['t0', 't1']\n"], done.stderr
    assert not [child for child in psutil.Process().children(recursive=True) if "shm_manager" in child.name()]


def test_the_memory_goes_with_the_buffer() -> None:
    chunk, buffer = bucket((100,))
    text, path = share_bucket(buffer, chunk.infos), Path(path_of(buffer))
    opened, _ = open_bucket(text)
    kept, held = buffer.clone(), path.readlink()
    assert "rlx-shared" in str(held)
    del buffer
    assert not path.exists() or path.readlink() != held
    assert torch.equal(opened, kept)  # who has opened it keeps it
    with pytest.raises(ValueError, match=r"shared tensors cannot be opened|no flattened bucket"):
        open_bucket(text)


def test_a_sender_that_has_ended_is_told() -> None:
    code = (
        "import torch; from rlx.rollout.sglang.host_memory import shared_copy;"
        "from rlx.rollout.sglang.shared_tensors import share_bucket; from rlx.sync.chunks import tensor_info;"
        "t = torch.ones(9, dtype=torch.uint8); b = shared_copy(t); print(share_bucket(b, [tensor_info('a', t)]))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    text = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True, timeout=120, env=env).stdout
    with pytest.raises(ValueError, match=r"cannot be opened: .*No such file"):
        open_bucket(text.strip())


def test_only_shared_memory_is_opened(tmp_path: Path) -> None:
    """A text may name any file; none but a process's open descriptor is looked at, and never written to."""
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    _, buffer = bucket((8,))
    for path, shared in ((str(file), False), (f"{path_of(buffer)}/../../../..{file}", False), (path_of(buffer), True)):
        with pytest.raises(ValueError, match="no memory that a process shares"):
            open_words(path, shared, 2)
    with pytest.raises(ValueError, match="take shared_copy of it"):
        share_bucket(torch.zeros(4, dtype=torch.uint8), [tensor_info("a", torch.zeros(4, dtype=torch.uint8))])
    evil = pickle.dumps({"flattened_tensor": getattr, "metadata": []})
    with pytest.raises(ValueError, match=r"builtins\.getattr has no place"):
        open_bucket(base64.b64encode(evil).decode())
