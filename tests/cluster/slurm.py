"""launch/train.slurm on a SLURM cluster of two nodes on this machine: the final weights are the same in all scenarios.

    python -m tests.cluster.slurm [--only NAME ...]        about 15 minutes; needs root (see cluster.py)

Each scenario is one job on two nodes with one process each. It must end with the same reward model as an undisturbed
run. After `scontrol requeue`, SLURM holds a job back for two minutes; the tests shorten this (`scontrol update
StartTime=now`).
"""

import argparse
import os
import signal
import time
from pathlib import Path

from tests.cluster import lab
from tests.cluster.cluster import Cluster, run

STEPS, SAVE_STEPS = 150, 10


class Job:
    """`sbatch OPTIONS launch/train.slurm SCRIPT FLAGS`; all its files are under `folder`."""

    def __init__(self, folder: Path, command: list[str], *options):
        self.folder, self.out, self.began = folder, folder / "out", time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        options = ("--parsable", "--nodes", 2, "--cpus-per-task", 1, "--output", folder / "job.out", *options)
        self.id = run("sbatch", *options, lab.ROOT / "launch" / "train.slurm", *command)

    def field(self, name: str) -> str:
        fields = run("scontrol", "show", "job", "--oneliner", self.id).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    def output(self) -> str:
        """The output of the batch script: one line for every start and end."""
        file = self.folder / "job.out"
        return file.read_text() if file.exists() else ""

    def steps(self) -> list[int]:
        """The steps done over all restarts, in order."""
        logs = sorted(self.out.glob(f"slurm/{self.id}.*.log"), key=lambda log: int(log.suffixes[-2][1:]))
        return lab.logged_steps("".join(log.read_text(errors="replace") for log in logs))

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        """Wait until the job has done `step` more steps."""
        done = len(self.steps())
        lab.wait_for(lambda: len(self.steps()) >= done + step, seconds, f"job {self.id} has done {step} steps")

    def wait(self, *states: str, seconds: float = 400) -> str:
        """Wait until the job is in one of these states. After a requeue, it is released after ten seconds."""
        queued = None

        def reached():
            nonlocal queued
            state = self.field("JobState")
            if state != "PENDING" or state in states:
                queued = None
            elif self.field("Reason") == "BeginTime":
                queued = queued or time.monotonic()
                if time.monotonic() > queued + 10:  # before that, the nodes may still refuse the job
                    run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            return state in states and state

        return lab.wait_for(reached, seconds, f"job {self.id} is {' or '.join(states)}, was {self.field('JobState')}")


class Lab:
    """The scenarios. Each is a method, whose docstring is the description in the table."""

    def __init__(self, folder: Path, slurm: Cluster):
        self.folder, self.slurm, self.world = folder, slurm, lab.make_world(folder / "world")

    def job(self, name: str, *options, **flags):
        command = lab.training(self.world, self.folder / name / "out", STEPS, SAVE_STEPS, **flags)
        return Job(self.folder / name, command, *options)

    def undisturbed(self) -> Job:
        """nothing; then eval_rm.py as a job"""
        job = self.job("undisturbed", "--time", 10)
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        flags = ["--model_name_or_path", job.out / "model", "--dataset_path", self.world / "rm_test.jsonl"]
        folder = self.folder / "evaluation"
        evaluation = Job(folder, [lab.ROOT / "eval_rm.py", *flags, "--output_dir", folder / "out"], "--time", 10)
        assert evaluation.wait("COMPLETED", "FAILED") == "COMPLETED", evaluation.output()
        assert (evaluation.out / "report.json").exists()
        return job

    def time_limit(self) -> Job:
        """the time limit of two minutes is reached before the end"""
        slow = {
            "eval_dataset_path": self.world / "rm_test.jsonl",
            "eval_steps": 1,
        }  # takes time and does not change the weights
        job = self.job("time_limit", "--time", 2, "--signal", "B:USR1@75", **slow)
        assert job.wait("COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", job.output()
        assert int(job.field("Restarts")) >= 1 and "SIGUSR1" in job.output()
        return job

    def preemption(self) -> Job:
        """an urgent job takes its nodes"""
        job = self.job("preemption", "--time", 10, "--cpus-per-task", 2)
        job.wait_for_step(25)
        urgent = ("--partition", "high", "--nodes", 2, "--cpus-per-task", 2, "--time", 1, "--output", "/dev/null")
        other = run("sbatch", "--parsable", *urgent, "--wrap", "srun sleep 3")
        lab.wait_for(lambda: "JobState=RUN" in run("scontrol", "show", "job", other), 60, "the urgent job runs")
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        return job

    def requeued(self) -> Job:
        """a user runs `scontrol requeue`"""
        job = self.job("requeued", "--time", 10)
        job.wait_for_step(25)
        run("scontrol", "requeue", job.id)
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        assert int(job.field("Restarts")) == 1
        return job

    def node_failure(self) -> Job:
        """a node dies: its slurmd, its steps and its processes are killed with -9; it comes back later"""
        job = self.job("node_failure", "--time", 10)
        job.wait_for_step(25)
        doomed = of_node("n2")
        self.slurm.end("slurmd.n2", signal.SIGKILL)
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        job.wait("PENDING", seconds=120)
        self.slurm.start_node("n2")
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        return job

    def rank_killed(self) -> Job:
        """one process is killed with -9: torchrun restarts all processes within the job"""
        job = self.job("rank_killed", "--time", 10)
        job.wait_for_step(25)
        os.kill(lab.ranks(job.out)[-1], signal.SIGKILL)
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        assert int(job.field("Restarts")) == 0
        return job

    def torchrun_killed(self) -> Job:
        """one node's torchrun is killed with -9"""
        job = self.job("torchrun_killed", "--time", 10)
        job.wait_for_step(25)
        os.kill(lab.agents(job.out)[-1], signal.SIGKILL)
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        return job

    def cancelled(self) -> Job:
        """a user runs `scancel` and later submits the same job again"""
        job = self.job("cancelled", "--time", 10)
        job.wait_for_step(25)
        run("scancel", job.id)
        job.wait("CANCELLED")
        lab.wait_for(lambda: "left to SLURM" in job.output(), 30, "the cancelled job has ended")
        assert lab.read_exit_json(job.out)["status"] == "stopped", lab.read_exit_json(job.out)
        job = self.job("cancelled", "--time", 10)
        assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
        return job


def of_node(name: str) -> list[int]:
    """The ids of all job processes on a node and of their parent slurmstepd processes."""
    tasks = [pid for pid in lab.processes() if f"SLURMD_NODENAME={name}" in lab.environment_of(pid)]
    parents = {lab.parent_of(pid) for pid in tasks}
    return tasks + [pid for pid in parents if lab.command_of(pid).startswith("slurmstepd")]


SCENARIOS = [name for name, f in vars(Lab).items() if getattr(f, "__annotations__", {}).get("return") is Job]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lab.scenario_flags(parser, SCENARIOS)
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # both nodes are this machine
    with lab.scenarios(args) as folder, Cluster(folder / "slurm") as slurm:
        print(run("sinfo", "--version"))
        laboratory = Lab(folder, slurm)
        lab.run_scenarios(laboratory, args.only, lab.two_processes(folder, laboratory.world, STEPS, SAVE_STEPS))


if __name__ == "__main__":
    main()
