"""How to start an engine process and how to know that it is ready. Spawning is ``rlx.cluster``'s task."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from rlx.arch.architecture import is_megatron_checkpoint
from rlx.config.parts import EngineSettings
from rlx.rollout.flags import flags
from rlx.rollout.server_args import server_args
from rlx.rollout.sglang.answers import EngineError

_READY = re.compile(r"^rlx-serve ready port=(\d{1,5})\s*$")
_POLL_S = 0.1
_ONE_CHECK_S = 20.0
# Engines are our own or named by the user; a proxy from the environment must not stand between.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def engine_command(engines: EngineSettings, *, index: int, port: int, python: str, parent_pipe: int | None) -> list[str]:
    """The command line of embedded engine ``index``. ``port`` 0 lets the system choose (read it with ``parse_ready_port``);
    ``parent_pipe`` is a file descriptor at whose end of file the engine exits. ValueError names a wrong setting."""
    rollout, cluster, precision = engines.rollout, engines.cluster, engines.precision
    if not 0 <= index < rollout.num_engines:
        raise ValueError(f"engine index {index} is not in 0..{rollout.num_engines - 1} (rollout.num_engines)")
    command = [python, "-m", "rlx.cli.serve", "--model", engines.model_path, "--port", str(port), "--dtype", precision.name]
    command += ["--rank", str(index), "--device", cluster.device, "--weight-timeout-s", str(engines.timeout_s)]
    if cluster.threads_per_rank is not None:
        command += ["--threads", str(cluster.threads_per_rank)]
    if precision.fp32_head:
        command.append("--enable-fp32-lm-head")
    if is_megatron_checkpoint(engines.model_path):
        command.append("--await-weights")  # it cannot read them; the trainers publish theirs before the first request
    if parent_pipe is not None:
        command += ["--parent-pipe", str(parent_pipe)]
    return command + flags(server_args(rollout))


def parse_ready_port(line: str) -> int | None:
    """The port in an engine's ready line ``rlx-serve ready port=PORT``, None for any other line."""
    match = _READY.match(line)
    return int(match.group(1)) if match else None


def wait_until_healthy(url: str, timeout_s: float, alive: Callable[[], bool], log_tail: Callable[[], str]) -> None:
    """Poll ``/health`` until it answers 200. EngineError with the last log lines when ``alive`` says that the process
    ended, or after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    seen = "not asked yet"
    while True:
        if not alive():
            raise _failed(url, "the engine process ended before it was healthy", log_tail)
        left = deadline - time.monotonic()
        if left <= 0:
            raise _failed(url, f"the engine was not healthy within {timeout_s:g} s (last: {seen})", log_tail)
        try:
            with _open(f"{url.rstrip('/')}/health", timeout=min(left, _ONE_CHECK_S)) as response:
                if response.status == 200:
                    return
                seen = f"HTTP {response.status}"
        except urllib.error.HTTPError as error:
            seen = f"HTTP {error.code}"
            error.close()
        except (OSError, http.client.HTTPException) as error:
            seen = f"{type(error).__name__}: {error}"
        time.sleep(_POLL_S)


def _failed(url: str, problem: str, log_tail: Callable[[], str]) -> EngineError:
    return EngineError(url, f"{problem}; last lines of its log:\n{log_tail().rstrip() or '(empty)'}", retryable=False)
