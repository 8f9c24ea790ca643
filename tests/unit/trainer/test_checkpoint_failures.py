"""What torch raises of a checkpoint is an OSError with the first rank's cause."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from rlx.parallel.checkpoint import failures_named


def test_the_first_ranks_cause_is_told() -> None:
    failures = {2: (OSError("no space left"), None), 1: (EOFError("ran out of input"), None)}
    told = r"checkpoint /x/policy cannot be read \(trainer rank 1: EOFError: ran out of input\)"
    with pytest.raises(OSError, match=told), failures_named(Path("/x/policy"), "read"):
        raise CheckpointException("load", failures)  # type: ignore[arg-type]


def test_what_torchs_checkpoints_warn_of_is_left_unsaid() -> None:
    """Of Megatron's way of calling them nothing is the user's to change; other warnings are heard."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with failures_named(Path("/x/policy"), "read"):
            for module in ("torch.distributed.checkpoint.utils", "mine"):
                warnings.warn_explicit(f"of {module}", UserWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in heard] == ["of mine"]
