"""A SLURM cluster of one node, this machine, for the length of a test: own configuration, ports, key and state."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.ports import free_port

_CONF = """
ClusterName=rlxtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
CryptoType=crypto/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
StateSaveLocation={state}
SlurmdSpoolDir={spool}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing_programs() -> list[str]:
    """What of SLURM is not installed here."""
    return [name for name in ("sbatch", "srun", "scontrol", "scancel", "slurmctld", "slurmd", "munged") if not shutil.which(name)]


class Slurm:
    """The running cluster; ``env`` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._socket = self._start_munge()
        conf = folder / "slurm.conf"
        for name in ("state", "spool"):
            (folder / name).mkdir()
        text = _CONF.format(
            host=socket.gethostname().split(".")[0],
            ctld_port=free_port(),
            slurmd_port=free_port(),
            munge=self._socket,
            state=folder / "state",
            spool=folder / "spool",
            folder=folder,
            cpus=os.cpu_count(),
        )
        conf.write_text(text)
        self.env = os.environ | {"SLURM_CONF": str(conf)}
        for daemon in ("slurmctld", "slurmd"):
            self._start([daemon, "-D", "-f", str(conf)])
        self._wait_for_idle()

    def run(self, *command: str, check: bool = True) -> str:
        """A SLURM command's output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED and so on."""
        fields = self.run("scontrol", "show", "job", job)
        return fields.partition("JobState=")[2].split()[0]

    def wait_for(self, job: str, *states: str, limit_s: float) -> str:
        """Wait for one of the states; AssertionError with the logs otherwise."""
        deadline = time.monotonic() + limit_s
        while (now := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {now}, not {states}: {self._logs()}"
            time.sleep(0.3)
        return now

    def close(self) -> None:
        """End the daemons, the jobs first."""
        self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, command: list[str], user: str | None = None) -> None:
        with (self.folder / f"{Path(command[0]).name}.out").open("w") as out:
            self._daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, user=user))

    def _start_munge(self) -> Path:
        folder = Path(f"/tmp/rlx-munge-{secrets.token_hex(4)}")
        folder.mkdir(mode=0o755)
        self.munge_folder = folder
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        owner = pwd.getpwnam("munge")
        for path in (folder, key):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        places = [f"--key-file={key}", f"--socket={folder}/socket", f"--pid-file={folder}/pid"]
        places += [f"--log-file={folder}/log", f"--seed-file={folder}/seed"]
        self._start(["munged", "--foreground", "--force", *places], user="munge")
        deadline = time.monotonic() + 20
        while not (folder / "socket").exists():
            assert time.monotonic() < deadline, "munged did not start"
            time.sleep(0.1)
        return folder / "socket"

    def _wait_for_idle(self) -> None:
        deadline = time.monotonic() + 60
        while "idle" not in self.run("sinfo", "-h", "-o", "%T", check=False):
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.3)

    def _logs(self) -> str:
        texts = [f"{path}:\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts + [path.read_text()[-3000:] for path in sorted(self.folder.glob("logs/*.log"))])
