"""Where a model comes from: a folder, or a hub id; and the files that must stand beside its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from converters.plan import Parameter
from rlx.arch.architecture import Architecture, parse_config_json
from rlx.arch.families.registry import architecture_of
from rlx.models.hf.companions import Companions
from rlx.models.hf.files import HEAD, HfFiles, refuse_untied
from rlx.models.hf.whole import tensor_problems

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
NO_TOKENIZER = "none"
# Recomputed from the configuration by every reader.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq$")


def described_by(file: Path) -> Architecture:
    """What a config.json describes; ValueError names the file and what is wrong with it."""
    config = parse_config_json(file)
    try:
        return architecture_of(config)
    except ValueError as error:
        names = config.get("architectures")
        raise ValueError(f"{file}: {error}{f' (architectures: {names})' if names else ''}") from error


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
    problems = list(tensor_problems(source, expected))
    left_out = list(_left_out(source, expected, arch))
    unknown = sorted(set(present) - expected.keys() - set(left_out))
    problems += [f"{source.path / present[name]}: {name} is unknown to {arch.model_type}" for name in unknown]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source.path} does not fit its configuration:\n  " + "\n  ".join(problems[:20]) + more)
    return left_out


def _left_out(source: HfFiles, expected: dict[str, tuple[int, ...]], arch: Architecture) -> Iterator[str]:
    if arch.tied_embeddings:
        refuse_untied(source)
    for name in source.files:
        if name not in expected and (_DERIVED.match(name) or (name == HEAD and arch.tied_embeddings)):
            yield name
