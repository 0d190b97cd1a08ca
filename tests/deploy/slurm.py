"""Batch scripts run as Slurm runs them, on this machine: its commands are small programs here.

`srun` starts a process for each task, tells it which it is, passes SIGTERM on, and ends with the
largest exit status. `scontrol` knows the nodes, and notes what is put back into the queue. Both
refuse options that are not in the table, which has what Slurm's manual says that they take.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.clusters import descendants, kill_all

SCRIPTS = Path(__file__).parents[2] / "deploy/slurm"
_NUMBER, _NAME = r"\d+", r"[\w.-]+"

OPTIONS = {
    "sbatch": {
        "job-name": _NAME,
        "nodes": _NUMBER,
        "ntasks-per-node": _NUMBER,
        "gpus-per-node": _NUMBER,
        "cpus-per-task": _NUMBER,
        "time": r"(\d+-)?\d{1,2}:\d\d:\d\d",
        "requeue": None,
        "signal": r"(B:)?[A-Z]+\d?(@\d+)?",
        "output": r"[\w%./-]+",
        "open-mode": "append|truncate",
    },
    "srun": {
        "nodes": _NUMBER,
        "ntasks": _NUMBER,
        "nodelist": _NAME,
        "exclude": _NAME,
        "cpus-per-task": _NUMBER,
        "kill-on-bad-exit": "[01]",
        "wait": _NUMBER,
    },
}
"""What options of each program take; None is nothing."""

_PROGRAM = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests.deploy import slurm
slurm.{function}(sys.argv[1:])
"""

_RECORDER = """#!{python} -S
import json, os, signal, sys, time
def stop(*_):
    note("stopped")
    sys.exit({on_sigterm})
def note(event):
    with open({log!r}, "a") as log:
        log.write(json.dumps([event, {name!r}, *sys.argv[1:]]) + chr(10))
signal.signal(signal.SIGTERM, stop)
note("began")
if {lasts}:
    time.sleep(300)
sys.exit({status})
"""


def check_options(program, words):
    """Return the options at the beginning of `words`, and the words after them.

    Raises:
        ValueError: The program has no such option, or it takes another value.
    """
    given = {}
    for position, word in enumerate(words):
        if not word.startswith("--"):
            return given, words[position:]
        name, equals, value = word[2:].partition("=")
        if name not in OPTIONS[program]:
            raise ValueError(f"{program} has no option --{name} that this table knows")
        wanted = OPTIONS[program][name]
        if (wanted is None) == bool(equals) or (wanted and not re.fullmatch(wanted, value)):
            raise ValueError(f"{program} {word}: it takes {wanted}")
        given[name] = value
    return given, []


def header_of(script):
    """Return the options in the `#SBATCH` lines of a script."""
    lines = script.read_text().splitlines()
    words = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    options, rest = check_options("sbatch", words)
    assert not rest
    return options


def srun(words):
    """Be `srun`."""
    options, command = check_options("srun", words)
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    num_tasks = int(options.get("ntasks", os.environ["SLURM_JOB_NUM_NODES"]))
    tasks = [  # in sessions of their own, as on other nodes: what the job is sent, srun tells them
        subprocess.Popen(
            command, env=os.environ | {"SLURM_PROCID": str(rank)}, start_new_session=True
        )
        for rank in range(num_tasks)
    ]
    while any(task.poll() is None for task in tasks):
        while told:
            number = told.pop()
            for task in tasks:
                task.send_signal(number)
        time.sleep(0.02)
    sys.exit(max(task.returncode % 256 for task in tasks))


def scontrol(words):
    """Be `scontrol`."""
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write("".join(f"{name}\n" for name in words[2].split(",")))
        return
    verb, job = words
    assert (verb, job) == ("requeue", os.environ["SLURM_JOB_ID"])
    Path(os.environ["REQUEUED"]).write_text(job)


class Job:
    """A batch script that runs on two nodes, both of them this machine."""

    def __init__(self, folder, script, *arguments, num_nodes=2, cpus=1, number=None, **variables):
        self.folder = folder
        self.log = folder / "commands"
        self.requeued = folder / "requeued"
        self.number = number or free_number()
        for name in ("srun", "scontrol"):
            write_program(
                self.bin / name,
                _PROGRAM.format(python=sys.executable, root=str(SCRIPTS.parents[1]), function=name),
            )
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(SCRIPTS.parents[1]),
            "REQUEUED": str(self.requeued),
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NODELIST": ",".join([socket.gethostname(), "other"][:num_nodes]),
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURM_CPUS_PER_TASK": str(cpus),
            **variables,
        }
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                ["bash", SCRIPTS / script, *map(str, arguments)],
                env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    @property
    def ports(self):
        """The two that the scripts take by the number of their job."""
        first = 20000 + 2 * (self.number % 5000)
        return first, first + 1

    @property
    def bin(self):
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def output(self):
        return (self.folder / "output").read_text()

    @property
    def events(self):
        """What the recorders have noted: event, program and its words."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def wait_until(self, condition, timeout_s=120):
        started_s = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() - started_s < timeout_s, self.output
            time.sleep(0.02)

    def cancel(self, timeout_s=120):
        """End the job as `scancel` does: all of it is told, and killed if it stays.

        Raises:
            subprocess.TimeoutExpired: It had to be killed.
        """
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill_all([*descendants(self.process.pid), self.process.pid])
            raise


@contextlib.contextmanager
def started_jobs(folder_of):
    """Give a function that starts batch scripts, of which none is left behind.

    `folder_of` tells the folder of a job by its number; it may be the same one.
    """
    jobs = []

    def start(*arguments, **options):
        folder = folder_of(len(jobs))
        folder.mkdir(exist_ok=True)
        jobs.append(Job(folder, *arguments, **options))
        return jobs[-1]

    try:
        yield start
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.cancel()


def free_number():
    """Return the number of a job whose ports are free."""
    first = os.getpid() % 5000
    for number in (*range(first, 5000), *range(first)):
        try:
            for port in (20000 + 2 * number, 20001 + 2 * number):
                socket.create_server(("", port)).close()
        except OSError:
            continue
        return 40000 + number
    raise AssertionError("no ports are free")


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def record(folder, name, *, lasts=False, status=0, on_sigterm=0):
    """Put a program in place of another: it notes its words, and waits for SIGTERM if it lasts."""
    (folder / "bin").mkdir(exist_ok=True)
    text = _RECORDER.format(
        python=sys.executable, log=str(folder / "commands"), name=name, lasts=lasts,
        status=status, on_sigterm=on_sigterm,
    )  # fmt: skip
    write_program(folder / "bin" / name, text)
