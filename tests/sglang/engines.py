"""Engines of either kind, started exactly as a run starts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, RunConfig, SyncConfig
from rlx.engines.engine_plan import EngineSite, plan_engine
from rlx.processes.child_environment import child_environment
from rlx.processes.children import Child, ChildSpec, stop_all
from rlx.rollout.keys import EngineKeys, new_keys
from rlx.rollout.server import parse_ready_port, wait_until_healthy
from rlx.rollout.sglang.control import EngineControl

# SGLang's checksums call torch.cuda.synchronize, which has no CPU build to fall back on: tests only.
CHECKSUM_SHIM = """
import importlib.abc, importlib.util, sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.synchronize = lambda *arguments, **named: None

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
"""


def sglang_python() -> str | None:
    """The interpreter of an environment with stock SGLang."""
    return os.environ.get("RLX_SGLANG_PYTHON")


def engine_config(kind: str, model: Path, folder: Path, *, tp: int = 1, **server_args: object) -> Config:
    if kind == "sglang":
        server_args = {"mem_fraction_static": 0.1, "max_total_tokens": 4096, **server_args}
    return Config(
        run=RunConfig(dir=str(folder)),
        model=ModelConfig(path=str(model)),
        data=DataConfig(train="none.jsonl"),
        reward=RewardConfig(name="exact"),
        cluster=ClusterConfig(device="cpu", threads_per_rank=1),
        sync=SyncConfig(timeout_s=60),
        rollout=RolloutConfig(engine=kind, tp=tp, python=sglang_python(), server_args=server_args),
    )


class RunningEngine:
    """One engine process with keys of its own; ``stop`` ends it."""

    def __init__(
        self,
        kind: str,
        model: Path,
        folder: Path,
        *,
        tp: int = 1,
        checksums: bool = False,
        server_args: Mapping[str, object] | None = None,
        transport: str = "auto",
        without: str | None = None,
    ) -> None:
        """``transport`` is what it is started for, ``without`` a variable that its environment lacks."""
        self.kind, self.model, self.tp, self.keys = kind, model, tp, new_keys()
        folder.mkdir(parents=True, exist_ok=True)
        config = engine_config(kind, model, folder, tp=tp, **(server_args or {}))
        config = replace(config, sync=replace(config.sync, transport=transport), model=replace(config.model, vision="train"))
        reading, self._writing = os.pipe()
        env = child_environment(config.cluster, f"test-{os.getpid()}-{id(self)}", num_peers=1, all_here=True)
        site = EngineSite(index=0, run_dir=folder, parent_pipe=reading, env=env, keys=self.keys)
        plan = plan_engine(EngineSettings.of(config), site)
        if checksums:
            shim = folder / "shim"
            shim.mkdir(exist_ok=True)
            (shim / "sitecustomize.py").write_text(CHECKSUM_SHIM)
            plan = replace(plan, env={**plan.env, "PYTHONPATH": f"{shim}:{plan.env['PYTHONPATH']}"})
        plan = replace(plan, env={name: value for name, value in plan.env.items() if name != without})
        self.plan = plan
        spec = ChildSpec(role="engine", rank=0, argv=plan.argv, env=plan.env, log_path=folder / "engine.log", pass_fds=(reading,))
        self.child = Child(spec)
        os.close(reading)
        self._port = plan.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def log(self) -> str:
        return self.child.log_text()

    def wait(self, limit_s: float = 600) -> RunningEngine:
        def alive() -> bool:
            return self.child.poll() is None

        while self._port is None and alive():
            self._port = next(filter(None, map(parse_ready_port, self.log.splitlines())), None)
        wait_until_healthy(self.url, limit_s, alive, lambda: self.log)
        return self

    def control(self, timeout_s: float = 60, keys: EngineKeys | None = None) -> EngineControl:
        return EngineControl(self.url, timeout_s=timeout_s, keys=keys or self.keys)

    def stop(self) -> None:
        os.close(self._writing)
        left = stop_all([self.child], None)
        assert not left
