"""A SLURM cluster of several nodes on one machine, with its own munge key, configuration, state and ports.

    python -m tests.cluster.cluster FOLDER [--nodes 2]      runs until Ctrl-C; `export SLURM_CONF=FOLDER/slurm.conf`

All files are in FOLDER. Every node is a slurmd with its own port. There are two partitions; jobs in `high` preempt jobs
in `low`. Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge (22.05 was used). A SLURM
installation of the system is not touched.
"""

import argparse
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.cluster import lab

CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=10
MinJobAge=3600
JobRequeue=1
MpiDefault=none
PropagateResourceLimits=NONE
{nodes}
PartitionName=low Nodes=n[1-{count}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=25 MaxTime=60 State=UP
PartitionName=high Nodes=n[1-{count}] PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
)


class Cluster:
    """`with Cluster(folder) as slurm:` starts a cluster and, at the end, terminates its daemons by process id."""

    def __init__(self, folder: Path, nodes: int = 2, port: int = 16817):
        lab.need_root()
        lab.need_programs("slurmctld", "slurmd", "sbatch", "munged", install="slurmctld slurmd slurm-client munge")
        self.folder, self.names = folder.resolve(), [f"n{i + 1}" for i in range(nodes)]
        self.conf, self.port = self.folder / "slurm.conf", port

    def __enter__(self):
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        nodes = [NODE.format(name=n, host=host, port=self.port + 2 + i) for i, n in enumerate(self.names)]
        self.conf.write_text(
            CONF.format(host=host, port=self.port, folder=self.folder, nodes="\n".join(nodes), count=len(nodes))
        )
        os.environ["SLURM_CONF"] = str(self.conf)
        try:
            self._munge()
            run("slurmctld", "-f", self.conf)
            for name in self.names:
                self.start_node(name)
            lab.wait_for(lambda: self.states() == ["idle"] * len(nodes), 60, "the nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        time.sleep(1)
        daemons = (*(f"slurmd.{name}" for name in self.names), "slurmctld", "munged")
        for wait in (0, 20):  # signal all daemons first, then wait for each
            for daemon in daemons:
                self.end(daemon, wait=wait)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        run("munged", "--force", *(f"--{flag}={self.folder / name}" for flag, name in files.items()))

    def start_node(self, name: str) -> None:
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        run("slurmd", "-N", name, "-f", self.conf)

    def end(self, daemon: str, number: int = signal.SIGTERM, wait: float = 20) -> None:
        """Send a signal to a daemon, named as its pid file ("slurmd.n1"); wait up to `wait` seconds for its exit."""
        file = self.folder / f"{daemon}.pid"
        pid = int(file.read_text()) if file.exists() else 0
        if pid and lab.command_of(pid).startswith(daemon.split(".")[0]):  # the process id may have been reused
            os.kill(pid, number)
            if wait:
                lab.wait_for(lambda: not lab.alive(pid), wait, f"{daemon} is gone")
                file.unlink(missing_ok=True)

    def states(self) -> list[str]:
        """The state of every node, such as "idle"."""
        return run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split()


def run(*command) -> str:
    """The output of a command; RuntimeError with its error message if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for all files")
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    with lab.interruptible(), Cluster(args.folder, args.nodes) as cluster:
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        signal.pause()
