"""Reading slices: the right bytes, no more than them, and clear words about broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlx.arch.families.registry import read_architecture, weight_table
from rlx.arch.weights import Shard
from rlx.models.hf.files import HfFiles, refuse_untied
from rlx.models.hf.folder import HfFolder
from rlx.models.hf.row_tensors import load
from tests.dist.checkpoints import make_llama, make_qwen2


def test_slices_along_any_dimension(tmp_path: Path) -> None:
    tensors = {
        "cube": torch.randn(5, 7, 3),
        "half": torch.randn(4, 9).bfloat16(),
        "line": torch.arange(11, dtype=torch.int64),
        "none": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = HfFolder(tmp_path)
    read = 0
    for name, dim, start, stop in (("cube", 0, 1, 4), ("cube", 1, 2, 7), ("cube", 2, 1, 2), ("half", 1, 3, 8), ("line", 0, 5, 5)):
        found, expected = folder.read(name, dim, start, stop), tensors[name].narrow(dim, start, stop - start)
        assert torch.equal(found, expected) and found.dtype == expected.dtype, (name, dim)
        read += expected.numel() * expected.element_size()
    assert torch.equal(folder.read("none", 0, 0, 0), tensors["none"])
    assert folder.bytes_read == read
    folder.close()
    assert torch.equal(folder.read("line", 0, 0, 11), tensors["line"])


@pytest.mark.parametrize("make", [make_qwen2, make_llama])
def test_tensor_parallel_ranks_read_their_own_slices(tmp_path: Path, make: object) -> None:
    """All ranks together read little more than the file once; only unsplit tensors are read by each of them."""
    path = make(tmp_path / "model")  # type: ignore[operator]
    arch, size = read_architecture(path), (path / "model.safetensors").stat().st_size
    for tp in (1, 2):
        total = 0
        for rank in range(tp):
            folder = HfFolder(path)
            for row in weight_table(arch).values():
                for layer in range(arch.num_layers) if "{layer}" in row.hf_names[0] else (0,):
                    names = [name.format(layer=layer) for name in row.hf_names]
                    load(row, folder.read, names, Shard(rank=rank, size=tp), arch)
            total += folder.bytes_read
        assert 0.95 * size < total <= 1.1 * size, (tp, total, size)


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8), "b": torch.ones(8)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*bytes"):
        HfFolder(tmp_path).shape("a")
    file.write_bytes(whole[:5])
    with pytest.raises(ValueError, match="cut short"):
        HfFolder(tmp_path).shape("a")
    header = json.dumps({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="a has dtype F4"):
        HfFolder(tmp_path).shape("a")
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"index\.json names gone\.safetensors"):
        HfFolder(tmp_path).shape("a")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        HfFolder(tmp_path).shape("a")


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    """Transformers takes the file, others what the index names."""
    save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(8)}, tmp_path / "old.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "old.safetensors"}}')
    with pytest.raises(ValueError, match=r"transformers loads model\.safetensors.*remove the one that is out of date"):
        HfFolder(tmp_path).shape("a")
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert HfFolder(tmp_path).read("a", 0, 0, 1) == 1


def test_a_tied_configuration_with_another_head_is_refused(tmp_path: Path) -> None:
    embedding = torch.randn(6, 4)
    for head, is_refused in (
        (embedding.clone(), False),
        (embedding + 1, True),
        (embedding.half(), True),
        (embedding[:5].clone(), True),
    ):
        save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, tmp_path / "model.safetensors")
        if is_refused:
            with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
                refuse_untied(HfFiles(tmp_path))
        else:
            refuse_untied(HfFiles(tmp_path))
