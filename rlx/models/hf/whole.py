"""Whether the weights of a model folder are all there and as its config.json says, from their headers alone. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlx.arch.architecture import Architecture, is_megatron_checkpoint
from rlx.arch.sizes import expected_shapes
from rlx.models.hf.companions import MANIFEST
from rlx.models.hf.files import HfFiles, refuse_untied

LOADABLE = ("float32", "bfloat16", "float16")
SCORE, SCORE_BIAS = "score.weight", "score.bias"
_SHOWN = 3
_BUFFERS = (".inv_freq", ".masked_bias")


def check_weights(folder: str | Path, arch: Architecture, *, without: str | None = None) -> None:
    """ValueError for a folder whose weights cannot be loaded as ``arch``: files missing or cut short, tensors missing, misshapen
    or of a type that is no number of weights'. ``without`` names a tensor that the role does not read."""
    if is_megatron_checkpoint(folder):
        check_manifest(Path(folder))
        return
    source = HfFiles(folder)
    if arch.tied_embeddings:
        refuse_untied(source)
    expected = {name: shape for name, shape in expected_shapes(arch).items() if name != without}
    problems = list(tensor_problems(source, expected))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{folder} does not hold what its config.json says: {'; '.join(problems[:_SHOWN])}{more}")


def tensors_left_out(folder: str | Path, arch: Architecture) -> list[str]:
    """Tensors of the layers that the folder holds and ``arch`` has no place for: nobody reads them. Buffers of old exports
    aside, which follow from config.json."""
    if is_megatron_checkpoint(folder):
        return []
    expected = expected_shapes(arch)
    layers = tuple(f"model.layers.{number}." for number in range(arch.num_layers))
    names = (name for name in HfFiles(folder).files if name.startswith(layers) and not name.endswith(_BUFFERS))
    return sorted(name for name in names if name not in expected)


def tensor_problems(source: HfFiles, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with the expected tensors, one by one."""
    for name, shape in expected.items():
        if name not in source.files:
            yield f"no tensor {name}"
            continue
        stored = source.tensor(name)
        if stored.shape != shape:
            yield f"{stored.file}: {name} has shape {list(stored.shape)}, config.json implies {list(shape)}"
        if stored.dtype not in LOADABLE:
            yield f"{stored.file}: {name} has dtype {stored.dtype}; supported: {', '.join(LOADABLE)}"


def check_score(folder: str | Path, arch: Architecture) -> None:
    """ValueError for a reward model's head, where the folder holds one, that is not one number a sequence."""
    if is_megatron_checkpoint(folder):
        return
    source = HfFiles(folder)
    if SCORE in source.files and source.shape(SCORE) != (1, arch.hidden_size):
        raise ValueError(f"{folder}: {SCORE} has shape {source.shape(SCORE)}, a reward model's is {(1, arch.hidden_size)}")


def check_manifest(folder: Path) -> None:
    """ValueError for a converted checkpoint of which a file is missing or not as long as the converter left it."""
    file = folder / MANIFEST
    if not file.is_file():
        return
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from error
    for name, size in sizes:
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, {MANIFEST} says {size}: the checkpoint is not whole")
