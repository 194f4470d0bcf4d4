"""launch/multi_node.sh on two hosts: network namespaces on one machine, with a virtual cable that can be cut.

    python -m tests.cluster.netns [--only NAME ...]         about 6 minutes; needs root and Debian's package iproute2

Each host has its own network (10.77.0.0/24, without access to the outside) and its own host name. One process on each
host trains the same reward model as two processes on one host would. Cutting the cable loses packets but closes no
connection, as when a switch dies.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.cluster import lab

STEPS, SAVE_STEPS = 120, 10


class Hosts:
    """`with Hosts() as hosts:` creates two hosts and, at the end, kills their processes and removes them."""

    names = ("rmlab0", "rmlab1")

    def __init__(self):
        lab.need_root()
        lab.need_programs("ip", "unshare", install="iproute2 util-linux")

    def __enter__(self):
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            one, other = (("name", f"cable{i}", "netns", name) for i, name in enumerate(self.names))
            ip("link", "add", *one, "type", "veth", "peer", *other)
            for i, name in enumerate(self.names):
                ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
                ip("-n", name, "link", "set", f"cable{i}", "up")
                names = Path("/etc/netns") / name  # `ip netns exec` mounts these files over those in /etc
                names.mkdir(parents=True, exist_ok=True)
                (names / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 rmlab0\n10.77.0.2 rmlab1\n")
        except RuntimeError as error:
            self.__exit__()
            lab.skip(f"network namespaces cannot be made here: {error}")
        return self

    def __exit__(self, *_):
        for i, name in enumerate(self.names):
            self.kill_all_of(i)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def kill_all_of(self, host: int) -> None:
        """Kill all processes on a host with SIGKILL."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout
        for pid in map(int, listed.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cable(self, state: str) -> None:
        """Set the cable "down" (all packets are lost) or "up"."""
        ip("-n", self.names[1], "link", "set", "cable1", state)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Run:
    """A training run with one process on each host. A second run in the same folder resumes the first."""

    def __init__(self, folder: Path, world: Path, environment: dict | None = None, **flags):
        self.out, self.logs, self.hosts, self.began = folder / "out", [], [], time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(Hosts.names):
            launcher = [lab.ROOT / "launch" / "multi_node.sh", "--nodes", 2, "--head", Hosts.names[0], "--nproc", 1]
            command = [*launcher, *lab.training(world, self.out, STEPS, SAVE_STEPS, **flags)]
            host = [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "bash",
                "-c",
                'hostname $0 && exec bash "$@"',
                name,
            ]
            own = {"GLOO_SOCKET_IFNAME": f"cable{i}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            self.logs.append(folder / f"{name}.log")
            with open(self.logs[-1], "a") as log:
                whole = [str(word) for word in (*host, *command)]
                environ = os.environ | own | (environment or {})
                self.hosts.append(subprocess.Popen(whole, env=environ, stdout=log, stderr=log))

    def steps(self) -> list[int]:
        """The steps done, in order. Rank 0 logs them; torchrun decides at each start on which host rank 0 runs."""
        lines = [line for log in self.logs for line in log.read_text(errors="replace").splitlines()]
        return lab.logged_steps("\n".join(lines))

    def wait_for_step(self, step: int) -> None:
        lab.wait_for(lambda: step in self.steps(), 120, f"step {step}; see {self.logs[0].parent}")

    def wait(self, seconds: float = 300) -> None:
        """Wait until the processes on both hosts have ended successfully."""
        end = time.monotonic() + seconds
        codes = [host.wait(max(0.1, end - time.monotonic())) for host in self.hosts]
        assert codes == [0, 0] and lab.read_exit_json(self.out)["status"] == "finished", (
            codes,
            lab.read_exit_json(self.out),
        )


class Lab:
    """The scenarios. Each is a method, whose docstring is the description in the table."""

    def __init__(self, folder: Path, hosts: Hosts):
        self.folder, self.hosts, self.world = folder, hosts, lab.make_world(folder / "world")

    def undisturbed(self) -> Run:
        """nothing"""
        run = Run(self.folder / "undisturbed", self.world)
        run.wait()
        return run

    def cut_8(self) -> Run:
        """the cable is cut for 8 s"""
        run = Run(self.folder / "cut_8", self.world)
        run.wait_for_step(25)
        self.cut(8)
        run.wait()
        assert not lab.repeats(run.steps()), "no step is repeated"
        return run

    def cut_40(self) -> Run:
        """the cable is cut for 40 s, with --stall_timeout 15"""
        run = Run(self.folder / "cut_40", self.world, stall_timeout=15)
        run.wait_for_step(25)
        self.cut(40)
        run.wait()
        assert lab.repeats(run.steps()), "it was restarted"
        return run

    def dead_peer(self) -> Run:
        """one host is gone permanently; the other ends by itself; the same command on both hosts resumes"""
        return self._lose("dead_peer", gone=1)

    def dead_head(self) -> Run:
        """the head is gone permanently; the other host ends by itself; the same command on both hosts resumes"""
        return self._lose("dead_head", gone=0)

    def cut(self, seconds: float) -> None:
        self.hosts.cable("down")
        time.sleep(seconds)
        self.hosts.cable("up")

    def _lose(self, name: str, gone: int) -> Run:
        limits = {"HEAD_TIMEOUT": "30", "PET_RDZV_CONF": "join_timeout=30"}
        run = Run(self.folder / name, self.world, limits, stall_timeout=15)
        run.wait_for_step(25)
        self.hosts.cable("down")  # first, because killed processes would close their connections
        self.hosts.kill_all_of(gone)
        died = time.monotonic()
        code = run.hosts[1 - gone].wait(300)
        seconds = time.monotonic() - died
        assert code != 0 and not lab.ranks(run.out), "no process is left"
        self.hosts.cable("up")
        resumed = Run(self.folder / name, self.world, limits, stall_timeout=15)
        resumed.wait()
        resumed.remark = f" (it ended {seconds:.0f} s later, with status {code})"
        return resumed


SCENARIOS = [
    name
    for name, f in vars(Lab).items()
    if getattr(f, "__annotations__", {}).get("return") is Run and not name.startswith("_")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lab.scenario_flags(parser, SCENARIOS)
    args = parser.parse_args()
    with lab.scenarios(args) as folder, Hosts() as hosts:
        laboratory = Lab(folder, hosts)
        lab.run_scenarios(laboratory, args.only, lab.two_processes(folder, laboratory.world, STEPS, SAVE_STEPS))


if __name__ == "__main__":
    main()
