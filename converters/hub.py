"""Models of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def download(name: str) -> Path:
    """The folder of the model of this hub id, downloaded with progress bars unless it is there. ConnectionError says why not."""
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ConnectionError(f"--hf {name}: no such folder, and it cannot be downloaded from the hub: {first_line}") from error
