"""The measurement of `make bench-driver`, small: it runs, and what does not depend on a machine is as it says."""

from __future__ import annotations

import re
import subprocess
import sys

SMALL = "--samples 64 --tokens 160 --ranks 2 --large 48 96 --crowds 1 3 --repeats 1 --only-show"


def test_a_small_batch_costs_nine_bytes_a_token_and_some_numbers_a_sample() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_driver", *SMALL.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "64 samples of 160 tokens to 2 data-parallel ranks" in done.stdout
    found = re.search(r"([\d.]+) bytes a token over all ranks", done.stdout)
    assert found is not None and 9 <= float(found[1]) <= 10
    assert "a gloo scatter of the same bytes" in done.stdout and "3 ranks" in done.stdout and "GiB on the driver" in done.stdout
