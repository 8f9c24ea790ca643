"""What torch raises of a checkpoint is an OSError with the first rank's cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from rlx.parallel.checkpoint import failures_named


def test_the_first_ranks_cause_is_told() -> None:
    failures = {2: (OSError("no space left"), None), 1: (EOFError("ran out of input"), None)}
    told = r"checkpoint /x/policy cannot be read \(trainer rank 1: EOFError: ran out of input\)"
    with pytest.raises(OSError, match=told), failures_named(Path("/x/policy"), "read"):
        raise CheckpointException("load", failures)  # type: ignore[arg-type]
