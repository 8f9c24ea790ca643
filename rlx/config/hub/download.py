"""Downloads from the Hugging Face hub (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE are its client's), with progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

from rlx.config.hub.splits import split_files

_SHAPE = ["*.json", "*.txt", "*.jinja", "*.model"]
# Second copies of the weights in other forms.
_LEFT_OUT = ["*/*.safetensors", "consolidated*"]
# Where the hub keeps what it has converted of data sets in other forms.
_CONVERTED = "refs/convert/parquet"


def download_model(key: str, name: str, weights: bool) -> Path:
    """The snapshot of a model; ConnectionError says why not, naming ``key``."""
    wanted = [*_SHAPE, "*.safetensors"] if weights else _SHAPE
    with _explained(key, f"{name}: no such folder"):
        folder = _snapshot(name, "model", wanted)
    return _said(key, name, folder)


def download_split(key: str, name: str, wanted: str | None) -> Path:
    """The file of a data set's split (``train`` unless ``wanted`` names one, or CONFIG/SPLIT), or a folder of its files."""
    with _explained(key, f"{name}: no such file"):
        folder, files = _find(name, wanted)
        _snapshot(name, "dataset", files, folder.name)
    found = folder / files[0] if len(files) == 1 else _folder_of(folder, files, wanted or "train")
    return _said(key, f"{name}:{wanted or 'train'}", found)


@cache
def _said(key: str, name: str, found: Path) -> Path:
    """``found``, said once."""
    print(f"rlx: {key}: {name} is {found}", file=sys.stderr)
    return found


def _snapshot(name: str, kind: str, wanted: Sequence[str], revision: str | None = None) -> Path:
    found = snapshot_download(
        name,
        repo_type=kind,
        revision=revision,
        allow_patterns=list(wanted),
        ignore_patterns=_LEFT_OUT if kind == "model" else None,
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    return Path(found)


def _names(name: str, folder: Path) -> list[str]:
    """The files of a data set at the commit of a snapshot; without the hub those that are there."""
    try:
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_files(name, repo_type="dataset", revision=folder.name)
    except (OSError, HfHubHTTPError):
        return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _find(name: str, wanted: str | None) -> tuple[Path, list[str]]:
    """The snapshot that holds the split, and its files there: those that the repository has itself, else the converted ones."""
    missing: Exception | None = None
    for revision in (None, _CONVERTED):
        try:
            folder = _snapshot(name, "dataset", ["README.md"], revision)
        except (RevisionNotFoundError, LocalEntryNotFoundError) as error:
            missing = missing or error
            continue
        files = split_files(_names(name, folder), _text(folder / "README.md"), wanted)
        if files is not None:
            return folder, files
    if isinstance(missing, LocalEntryNotFoundError):
        raise missing
    raise ValueError("the data set holds no .parquet or .jsonl files")


def _folder_of(folder: Path, files: Sequence[str], split: str) -> Path:
    """A folder of links to the files, in their order, beside the snapshots."""
    together = folder.parent.parent / "rlx" / folder.name / split.replace("/", "-")
    together.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        link = together / f"{number:05d}-{Path(file).name}"
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(folder / file)
    return together


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


@contextmanager
def _explained(key: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConnectionError(
            f"{key}: {what}, and it cannot be downloaded from the hub: {first_line.strip()} (give a path, or an id of the hub;"
            " HF_TOKEN for one that is not public; without a network only what is in the cache of HF_HOME)"
        ) from error
    except ValueError as error:
        raise ValueError(f"{key}: {what.partition(': ')[0]}: {error}") from error
