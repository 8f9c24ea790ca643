"""Where a model comes from: a folder, or a hub id; and the files that must stand beside its weights."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.plan import Parameter
from rlx.arch.architecture import Architecture, parse_config_json
from rlx.arch.families.registry import architecture_of
from rlx.models.hf.companions import copy_companions
from rlx.models.hf.files import HfFiles

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
NO_TOKENIZER = "none"
CONVERTIBLE = ("float32", "bfloat16", "float16")  # by torch's names
# Recomputed from the configuration by every reader.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """Configuration and tokenizer of a conversion: ``config`` is a file, ``tokenizer`` a folder or None for none."""

    folder: Path
    config: Path
    tokenizer: Path | None

    def architecture(self) -> Architecture:
        config = parse_config_json(self.config)
        try:
            return architecture_of(config)
        except ValueError as error:
            names = config.get("architectures")
            raise ValueError(f"{self.config}: {error}{f' (architectures: {names})' if names else ''}") from error

    def copy_to(self, target: Path) -> None:
        copy_companions(self.folder, target)
        if self.tokenizer is not None and self.tokenizer != self.folder:
            copy_companions(self.tokenizer, target)
        # Last: a tokenizer's folder may have a configuration of its own, which is not this model's.
        shutil.copy(self.config, target / "config.json")


def resolve(name: str) -> Path:
    """A folder as it is; anything of the form owner/name is downloaded from the hub (with its progress bars)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise ValueError(f"--hf {name}: no such folder, and no hub id of the form owner/name")
    # A module of its own because the hub's client takes long to import, and most conversions start from a folder.
    downloaded: Path = importlib.import_module("converters.hub").download(name)
    return downloaded


def find_companions(folder: Path, config: str | None, tokenizer: str | None) -> Companions:
    """The configuration and tokenizer to use. ValueError names the missing file and the option that supplies it."""
    config_file = Path(config) if config else folder / "config.json"
    if config_file.is_dir():
        config_file = config_file / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{config_file} is missing; name the model's configuration with --config FILE")
    if tokenizer == NO_TOKENIZER:
        return Companions(folder=folder, config=config_file, tokenizer=None)
    tokenizer_folder = Path(tokenizer) if tokenizer else folder
    if not any((tokenizer_folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"{tokenizer_folder} has no tokenizer ({', '.join(_TOKENIZERS)}); name a folder that has one with"
            f" --tokenizer DIR, or go without by --tokenizer {NO_TOKENIZER}"
        )
    return Companions(folder=folder, config=config_file, tokenizer=tokenizer_folder)


def check_tensors(source: HfFiles, wanted: list[Parameter], arch: Architecture) -> list[str]:
    """Compare the folder's tensors with what the configuration implies; the names that are rightly left out.

    Reads every file's header. ValueError lists missing, misshapen, unconvertible and unknown tensors.
    """
    expected = {name: shape for p in wanted for name, shape in zip(p.hf_names, p.hf_shapes, strict=True)}
    present = source.files
    problems = [f"no tensor {name}, which {arch.model_type} needs" for name in expected if name not in present]
    for name in present:
        stored = source.tensor(name)
        file = source.path / stored.file
        if name not in expected:
            continue
        if stored.shape != expected[name]:
            problems.append(f"{file}: {name} has shape {list(stored.shape)}, config.json implies {list(expected[name])}")
        if stored.dtype not in CONVERTIBLE:
            problems.append(f"{file}: {name} has dtype {stored.dtype}; convertible: {', '.join(CONVERTIBLE)}")
    left_out = list(_left_out(source, expected, arch))
    unknown = sorted(set(present) - expected.keys() - set(left_out))
    problems += [f"{source.path / present[name]}: {name} is unknown to {arch.model_type}" for name in unknown]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source.path} does not fit its configuration:\n  " + "\n  ".join(problems[:20]) + more)
    return left_out


def _left_out(source: HfFiles, expected: dict[str, tuple[int, ...]], arch: Architecture) -> Iterator[str]:
    for name in source.files:
        if name in expected:
            continue
        if _DERIVED.match(name):
            yield name
        elif name == "lm_head.weight" and arch.tied_embeddings:
            embedding = "model.embed_tokens.weight"
            if not same_tensor(source, name, source, embedding):
                raise ValueError(
                    f"{source.path}: {name} differs from {embedding}, though config.json ties them (tie_word_embeddings)"
                )
            yield name


def same_tensor(a: HfFiles, name_a: str, b: HfFiles, name_b: str) -> bool:
    """Whether two stored tensors are the same bits, compared block by block."""
    stored = a.tensor(name_a)
    if (stored.shape, stored.dtype) != (b.tensor(name_b).shape, b.tensor(name_b).dtype):
        return False
    blocks = row_blocks(stored.shape, stored.num_bytes)
    return all(a.read_rows(name_a, start, stop) == b.read_rows(name_b, start, stop) for start, stop in blocks)


def row_blocks(shape: tuple[int, ...], num_bytes: int, limit: int = 32 * 2**20) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most about ``limit`` bytes."""
    step = max(1, shape[0] * limit // max(num_bytes, 1))
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
