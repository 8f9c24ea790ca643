"""A launcher of dummies: ``dummy_launch.py RUN_DIR BEHAVIOURS_JSON [ENGINE_BEHAVIOUR [key=value ...]]``."""

import json
import sys
from pathlib import Path

import rlx.cluster.local as local
from rlx.cluster.launch import run_job
from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, RunConfig
from rlx.engines.manager import EnginePlan

CHILD = str(Path(__file__).with_name("dummy_child.py"))


def main() -> int:
    run_dir, behaviours, engine = sys.argv[1], sys.argv[2], sys.argv[3]
    settings = dict(word.split("=", 1) for word in sys.argv[4:])
    config = Config(
        model=ModelConfig(path="nowhere"),
        data=DataConfig(train="nothing.jsonl"),
        reward=RewardConfig(name="exact"),
        run=RunConfig(dir=run_dir, steps=4, failure_timeout_s=float(settings.get("failure_timeout_s", 60))),
        cluster=ClusterConfig(
            num_trainer_ranks=len(json.loads(behaviours)), threads_per_rank=1, colocated="colocated" in settings
        ),
        rollout=RolloutConfig(
            num_engines=max(1, int(engine != "none")),
            start_timeout_s={"silent": 2.0, "unhealthy": 2.0, "once": 5.0}.get(engine, 60.0),
            endpoints=["http://x"] * (engine == "none"),
            max_restarts=int(settings.get("max_restarts", 0)),
        ),
    )
    if "taken_port" in settings:
        ports, free_port = [int(settings["taken_port"])] * int(settings.get("times", 1)), local.free_port
        local.free_port = lambda: ports.pop() if ports else free_port()
    programs = local.Programs(
        trainer=lambda run_dir, file, pipe: [sys.executable, CHILD, "trainer", str(run_dir), str(file), str(pipe), behaviours],
        driver=lambda run_dir, file, pipe, stop: [sys.executable, CHILD, "driver", str(pipe), behaviours, str(stop)],
        engine=lambda config, site: EnginePlan(
            argv=[sys.executable, CHILD, "engine", str(site.parent_pipe), engine], env=site.env
        ),
    )
    return run_job(config, lambda run: local.LocalLaunch(EngineSettings.of(config), run, programs))


if __name__ == "__main__":
    sys.exit(main())
