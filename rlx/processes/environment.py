"""The environment of a process: the variables by which launchers tell a rank who it is (torchrun's names), GPUs, encoding."""

from __future__ import annotations

import locale
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from rlx.rollout.keys import EngineKeys

# What users set in their shell for the libraries of a run, by how the names begin; other machines would not have it.
HANDED_ON = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "HF_", "TRANSFORMERS_", "WANDB_", "SGLANG_", "NVTE_", "RLX_")

# What Megatron says at every import, in every rank, about packages that are optional here.
QUIET = {
    "PYTHONWARNINGS": ",".join(
        f"ignore:{notice}"
        for notice in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated")
    )
}


def enter_utf8_mode(module: str) -> None:
    """Begin this process again in Python's UTF-8 mode, as ``python -m module`` with its own arguments, where the locale has
    another encoding. Processes that it starts inherit the mode."""
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", module, *sys.argv[1:]])


def hidden_gpus(device: str) -> dict[str, str]:
    """What a process of a run on ``device`` (``cluster.device``) must have in its environment before it imports torch: on
    CPUs, that no GPU is there."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


def hide_gpus(device: str) -> None:
    """The same for this process and those that it starts."""
    os.environ.update(hidden_gpus(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """This process's place among the trainer ranks, of which ``ranks_here`` are on its machine."""

    rank: int
    local_rank: int
    world_size: int
    ranks_here: int


def rank_environment() -> RankEnvironment:
    """Read RANK, LOCAL_RANK and WORLD_SIZE. ValueError names the ones that are missing or no numbers."""
    found = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise ValueError(f"environment variable {name} must be a number, got {text!r}: start this through a launcher")
        found[name] = int(text)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"]))
    return RankEnvironment(rank=found["RANK"], local_rank=found["LOCAL_RANK"], world_size=found["WORLD_SIZE"], ranks_here=here)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks meet. ``is_hosted``: the launcher keeps the store there, so rank 0 must not open one.
    ``attempt`` counts the launcher's restarts of all ranks."""

    address: str
    port: int
    is_hosted: bool
    attempt: str
    node: int
    ranks_per_node: int

    def own_address(self) -> str:
        """This node's address as the others see it: where the route to the meeting place starts."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.address, self.port))  # a datagram socket only looks up the route
            return str(probe.getsockname()[0])


def rendezvous(world: RankEnvironment | None = None) -> Rendezvous:
    """Read torchrun's further variables; without them (plain ``srun`` with RANK and so on set) all ranks are one node's."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"environment variable {' and '.join(missing)} must be set: start this through a launcher")
    world = world or rank_environment()
    ranks_per_node = world.ranks_here
    return Rendezvous(
        address=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        is_hosted=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        node=int(os.environ.get("GROUP_RANK", world.rank // ranks_per_node)),
        ranks_per_node=ranks_per_node,
    )


def default_interface(address: str) -> None:
    """Let gloo listen where ``address``, this node's own, is: it would else ask what the host's name resolves to."""
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface with this address; None when it is not this host's."""
    if address in ("localhost", "127.0.0.1"):
        return "lo"
    found = psutil.net_if_addrs()
    return next((name for name, entries in found.items() if any(entry.address == address for entry in entries)), None)


def report_requeue() -> bool:
    """Tell a wrapping script, through the file that RLX_REQUEUE_FILE names, to start the run again; False without one.

    torchrun turns every status but 0 into 1, so a status cannot.
    """
    path = os.environ.get("RLX_REQUEUE_FILE")
    if not path:
        return False
    with open(path, "w") as file:
        file.write("requeue\n")
    return True


def report_cause(lines: Sequence[str]) -> None:
    """Give a wrapping script, through the file that RLX_CAUSE_FILE names, what to say last: torchrun's own account follows
    ours on the terminal."""
    path = os.environ.get("RLX_CAUSE_FILE")
    if path:
        with open(path, "a") as file:
            file.write("\n".join(lines) + "\n")


def leave_launcher_store() -> None:
    """Once the world is joined: later meetings (with engines) are at stores of our own.

    While torchrun's mark is set, torch takes every store for torchrun's and opens none.
    """
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutNode:
    """Node ``number`` of those that hold engines only, beside ``trainer_nodes`` others."""

    number: int
    trainer_nodes: int
    meeting: Rendezvous


def rollout_node() -> RolloutNode:
    """Read NODE_RANK (among the rollout nodes), NNODES (trainer nodes), MASTER_ADDR and MASTER_PORT."""
    names = ("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ValueError(f"environment variable {', '.join(missing)} must be set; see launch/slurm")
    number, trainer_nodes = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])
    meeting = Rendezvous(
        address=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        is_hosted=True,
        attempt="0",
        node=trainer_nodes + number,
        ranks_per_node=0,
    )
    return RolloutNode(number=number, trainer_nodes=trainer_nodes, meeting=meeting)


def attached_keys() -> EngineKeys:
    """The keys of servers that others started: RLX_ENGINE_API_KEY and RLX_ENGINE_ADMIN_KEY, each optional. A key in a
    configuration file would be copied into every run folder."""
    return EngineKeys(api_key=os.environ.get("RLX_ENGINE_API_KEY"), admin_key=os.environ.get("RLX_ENGINE_ADMIN_KEY"))
