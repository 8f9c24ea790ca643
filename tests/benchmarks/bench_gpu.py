"""Everything that wants GPUs, measured in one run and printed as one table; needs stock SGLang.

    python -m tests.benchmarks.bench_gpu --out OUT [--parts raw,scores,update,sync,rollout,colocated] [--gpus N]

The trainer has the first GPU, servers share the others. With one GPU the parts raw and scores, which need two, are left out, and
sync goes through CUDA IPC. Servers run in RLX_SGLANG_PYTHON where that is set. Exit status 1 when a part failed.

Every part is a process of its own with a time limit; results go to OUT/bench.json, logs to OUT/bench-PART.log.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rlx.rollout.flags import flags
from rlx.rollout.sglang.server import ROOM_ABOVE_PORT, cuda_runtime_folders, write_modules
from rlx.rollout.sglang.shared_tensors import RECEIVER
from rlx.sync.ports import free_port
from tests.benchmarks.gpu.models import write_config

PARTS = ("raw", "scores", "update", "sync", "rollout", "colocated")
# Unequal settings on trainer and server break the first broadcast; SGLang sets these for itself.
HEALTHY_S = 200.0  # a cold machine compiles kernels first
NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
SERVER: dict[str, object] = {
    "attention-backend": "triton",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "cuda-graph-backend-prefill": "disabled",
    "cuda-graph-max-bs": 256,
    "skip-tokenizer-init": True,
    "log-level": "warning",
    "load-format": "dummy",
    "dtype": "bfloat16",
    "custom-weight-loader": [RECEIVER],
}
# On the trainers' GPUs: name -> layout of two trainer ranks, and engines as (GPUs of each).
SHARED: dict[str, tuple[dict[str, int], tuple[tuple[int, ...], ...]]] = {
    "TP2, two engines": ({"tp": 2}, ((0,), (1,))),
    "TP2, one engine of TP2": ({"tp": 2}, ((0, 1),)),
    "PP2, two engines": ({"pp": 2}, ((0,), (1,))),
    "EP2, two engines": ({"ep": 2}, ((0,), (1,))),
}
# What each server may take of its GPU, beside the others there.
FRACTIONS = {"1.5B": 0.22, "7B": 0.35, "30B-A3B-cut": 0.3}


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_healthy(self, limit_s: float) -> str | None:
        """None once it is healthy; otherwise what is wrong."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return f"it ended with status {self.process.returncode}"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return None
            except OSError:
                time.sleep(0.5)
        return f"not healthy within {limit_s:.0f} s"


class Bench:
    def __init__(self, out: Path, work: Path, gpus: int) -> None:
        self.out, self.work, self.gpus = out, work, gpus
        self.results: dict[str, object] = {}
        self.servers: dict[str, Server] = {}
        self.failed: list[str] = []

    def run(self, part: str, argv: Sequence[str], limit_s: float, **env: str) -> bool:
        """Run a part; take the results it prints. A part that fails or is late is reported and does not end the rest."""
        began, log = time.monotonic(), self.out / f"bench-{part}.log"
        print(f"-- {part}: {' '.join(argv)[:150]}", flush=True)
        with log.open("a") as file:
            child = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, env=os.environ | NCCL | env, start_new_session=True
            )
            try:
                code: int | str = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                code = f"no end within {limit_s:.0f} s"
        lines = log.read_text(errors="replace").splitlines()
        for line in lines:
            if line.startswith("RESULT "):
                self.results |= json.loads(line.removeprefix("RESULT "))
        if code:
            self.fail(part, f"({code}):\n   " + "\n   ".join(lines[-25:]))
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
        (self.out / "bench.json").write_text(json.dumps(self.results, indent=1))
        return code == 0

    def fail(self, part: str, why: str) -> None:
        """Say so at once and again in the table."""
        print(f"   FAILED {part} {why}", flush=True)
        self.failed.append(part)

    def healthy(self, part: str, shape: str) -> bool:
        """Wait for the server of a shape; one that does not come is a failure of the part, shown with its log's end."""
        server = self.servers.get(shape)
        if server is None:
            self.fail(part, f"no server of the shape {shape}: name it in --shapes")
            return False
        problem = server.wait_healthy(HEALTHY_S)
        if problem is not None:
            lines = server.log.read_text(errors="replace").splitlines()[-25:]
            self.fail(part, f"the {shape} server: {problem}; its log ends:\n   " + "\n   ".join(lines))
        return problem is None

    def raw(self) -> None:
        """Two ranks, a GPU each."""
        code = "import sys; from rlx.processes.local_ranks import run_local_ranks, this_module;"
        code += "sys.exit(run_local_ranks(this_module('tests.benchmarks.gpu.raw'), 2))"
        self.run("raw", [sys.executable, "-c", code], 60)

    def scores(self) -> None:
        """Log-probs of the Megatron policy against transformers on a small random model."""
        folder = write_config("tiny", self.work / "tiny")
        write = "import sys, torch; from pathlib import Path; from tests.benchmarks.gpu.models import write_weights;"
        write += "write_weights(Path(sys.argv[1]), torch.float32, 0.05)"
        self.run("scores", [sys.executable, "-c", write, str(folder)], 60)
        module = [sys.executable, "-m", "tests.benchmarks.gpu.reference", str(folder), str(self.work)]
        if not self.run("scores", module, 90):
            return
        for name, options in {
            "fp32 TP2": ["--dtype=fp32", "--tp=2"],
            "bf16 TP2": ["--dtype=bf16", "--tp=2"],
            "bf16": ["--dtype=bf16"],
            "fp32 CP2": ["--dtype=fp32", "--cp=2"],
            "fp32 PP2": ["--dtype=fp32", "--pp=2"],
        }.items():
            target = self.work / "scored.jsonl"
            argv = [sys.executable, "-m", "rlx.cli.main", "score", f"--model={folder}", f"--tokens={self.work / 'tokens.jsonl'}"]
            if self.run("scores", [*argv, f"--out={target}", *options], 120):
                for reference in ("fp32", "bf16"):
                    found = difference(target, self.work / f"reference-{reference}.jsonl")
                    self.results[f"scores/{name} against transformers {reference}"] = found

    def update(self) -> None:
        """The RL update of the 1.5B shape against plain Megatron."""
        folder = write_config("1.5B", self.work / "1.5B-weights")
        write = "import sys, torch; from pathlib import Path; from tests.benchmarks.gpu.models import write_weights;"
        write += "write_weights(Path(sys.argv[1]), torch.bfloat16)"
        self.run("update", [sys.executable, "-c", write, str(folder)], 90)
        for spec in ("transformer_engine", "torch"):
            argv = [sys.executable, "-m", "tests.benchmarks.gpu.update", str(folder), spec]
            self.run(f"update-{spec}", argv, 150, CUDA_VISIBLE_DEVICES="0")

    def sync(self) -> None:
        place = "apart" if self.gpus > 1 else "together"
        for shape, server in self.servers.items():
            argv = [sys.executable, "-m", "tests.benchmarks.gpu.sync", shape, str(self.work / shape), server.url, place]
            if self.healthy("sync", shape):
                self.run(f"sync-{shape}", argv, 240, CUDA_VISIBLE_DEVICES="0")

    def rollout(self) -> None:
        if self.healthy("rollout", "1.5B"):
            argv = [sys.executable, "-m", "tests.benchmarks.gpu.rollout", str(self.work / "1.5B"), self.servers["1.5B"].url]
            self.run("rollout", argv, 120, CUDA_VISIBLE_DEVICES="0")

    def colocated(self, shape: str, names: Sequence[str]) -> None:
        """Publications to engines on the trainers' GPUs, several sets of engines one after the other in one start."""
        folder = write_config(shape, self.work / f"{shape}-shared")
        with ExitStack() as stack:
            engines: dict[tuple[tuple[int, ...], ...], list[Server]] = {}
            for name in names:
                seats = SHARED[name][1]
                if seats not in engines:
                    extra = {"tp-size": len(seats[0]), "max-total-tokens": 65536, "enable-memory-saver": True}
                    logs = [self.out / f"shared-{shape}-{len(engines)}-{number}.log" for number in range(len(seats))]
                    engines[seats] = [
                        stack.enter_context(server(folder, log, 0.9, gpus, extra)) for log, gpus in zip(logs, seats, strict=True)
                    ]
            problems = [each.wait_healthy(HEALTHY_S) for servers in engines.values() for each in servers]
            if any(problems):
                tails = [each.log.read_text(errors="replace")[-2000:] for servers in engines.values() for each in servers]
                self.fail(f"colocated {shape}", f"{problems}\n" + "\n".join(tails))
                return
            every = [each for servers in engines.values() for each in servers]
            for each in every:
                post(each.url, "release_memory_occupation", {"tags": ["kv_cache", "weights"]})
            for name in names:
                layout, seats = SHARED[name]
                for each in engines[seats]:
                    post(each.url, "resume_memory_occupation", {"tags": ["kv_cache", "weights"]})
                arguments = [f"{shape} {name}", str(folder), json.dumps(layout), ",".join(each.url for each in engines[seats])]
                code = "import sys; from rlx.processes.local_ranks import run_local_ranks, this_module;"
                code += "sys.exit(run_local_ranks(this_module('tests.benchmarks.gpu.colocated', *sys.argv[1:]), 2))"
                self.run(f"colocated-{shape}-{name}", [sys.executable, "-c", code, *arguments, str(len(seats[0]))], 120)
                for each in engines[seats]:
                    with suppress(OSError):
                        post(each.url, "release_memory_occupation", {"tags": ["kv_cache", "weights"]})


def post(url: str, path: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60):
        pass


def difference(found: Path, reference: Path) -> dict[str, float]:
    pairs = [
        (ours, theirs)
        for a, b in zip(found.read_text().splitlines(), reference.read_text().splitlines(), strict=True)
        for ours, theirs in zip(json.loads(a)["logprobs"], json.loads(b)["logprobs"], strict=True)
    ]
    gaps = [abs(ours - theirs) for ours, theirs in pairs]
    return {"mean": sum(gaps) / len(gaps), "max": max(gaps)}


@contextmanager
def server(
    folder: Path, log: Path, fraction: float, gpus: Sequence[int], extra: Mapping[str, object] | None = None
) -> Iterator[Server]:
    """A stock SGLang server with weights of its own making; may not be healthy yet."""
    port = free_port(room_above=ROOM_ABOVE_PORT)
    python = os.environ.get("RLX_SGLANG_PYTHON", sys.executable)
    argv = [
        python,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(folder),
        "--port",
        str(port),
        *flags(SERVER | dict(extra or {})),
    ]
    modules = folder.parent / "modules"
    write_modules(modules, "cuda")
    path = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONPATH": path}
    libraries = [os.environ.get("LD_LIBRARY_PATH"), *cuda_runtime_folders(python)]
    env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    with log.open("w") as file:
        argv += ["--mem-fraction-static", str(fraction)]
        child = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            yield Server(url=f"http://127.0.0.1:{port}", process=child, log=log)
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def table(results: dict[str, object]) -> str:
    lines = ["| what | measured |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {json.dumps(value)} |" for name, value in results.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shapes", default="1.5B,7B,30B-A3B-cut", help=f"of the sync, among {', '.join(FRACTIONS)}")
    parser.add_argument("--shared", default="llama-8B", help="shapes of the part colocated")
    parser.add_argument("--gpus", type=int, choices=range(1, 9), default=2, help="GPUs to use (%(default)s)")
    args = parser.parse_args()
    parts = [part for part in args.parts.split(",") if args.gpus > 1 or part in ("update", "sync", "rollout")]
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path("/tmp/rlx-bench-gpu")
    shutil.rmtree(work, ignore_errors=True)
    bench = Bench(args.out, work, args.gpus)
    if args.gpus == 1 and "update" in parts:  # before any server takes its share of the only GPU
        bench.update()
        parts.remove("update")
    with ExitStack() as stack:
        for number, (shape, fraction) in enumerate(FRACTIONS.items()):
            wanted = "sync" in parts or ("rollout" in parts and shape == "1.5B")
            if wanted and shape in args.shapes.split(","):
                folder = write_config(shape, work / shape)
                log = args.out / f"server-{shape}.log"
                gpu = 1 + number % (args.gpus - 1) if args.gpus > 1 else 0
                bench.servers[shape] = stack.enter_context(server(folder, log, fraction, [gpu]))
        for part in PARTS[:-1]:
            if part in parts:
                getattr(bench, part)()
    if "colocated" in parts:  # once no other server is on the GPUs
        for shape in args.shared.split(","):
            experts = "experts" if "A3B" in shape else "dense"
            bench.colocated(shape, [name for name in SHARED if name.startswith("EP") == (experts == "experts")])
    print(table(bench.results | {f"FAILED: {part}": "see above" for part in bench.failed}))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
