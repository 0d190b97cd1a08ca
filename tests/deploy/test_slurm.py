"""deploy/slurm and deploy/torchrun: what the scripts start, and what they do when they are told."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.commands import parse_patchcache, parse_ray, parse_torchrun, shown_in
from tests.deploy.objects import DEPLOY
from tests.deploy.slurm import SCRIPTS, check_options, header_of, record, started_jobs

TORCHRUN = DEPLOY / "torchrun/train.sh"
BATCH = sorted(SCRIPTS.glob("*.sbatch"))


@pytest.fixture
def start(tmp_path):
    with started_jobs(lambda number: tmp_path) as start:
        yield start


@pytest.mark.parametrize("path", [*BATCH, TORCHRUN], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_slurm_puts_a_job_back_that_it_told_before_the_end(path):
    options = header_of(path)
    assert "requeue" in options
    assert options["signal"].startswith("B:USR1@")
    assert options["open-mode"] == "append"


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_the_commands_that_the_scripts_show_are_understood(path):
    shown = shown_in(path, "sbatch")
    assert shown
    for words in shown:
        _, (script, *ours) = check_options("sbatch", words[1:])
        assert script == path.name
        parse_patchcache(["patchcache", path.stem, *ours])


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_a_job_without_a_command_says_what_it_wants(path):
    done = subprocess.run(["bash", path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"usage: sbatch {path.name}" in done.stderr


def test_an_option_that_slurm_does_not_have_is_noticed():
    with pytest.raises(ValueError, match="no option --node "):
        check_options("sbatch", ["--node=2"])
    with pytest.raises(ValueError, match="--nodes=two: it takes"):
        check_options("srun", ["--nodes=two"])


TRAIN = ("train.sbatch", "beit", "--cache", "cache", "--out", "run")


def test_training_is_one_torchrun_on_each_node_that_meet_at_the_first(start, tmp_path):
    record(tmp_path, "torchrun")
    job = start(*TRAIN, SLURM_RESTART_COUNT="2")
    assert job.process.wait(60) == 0, job.output
    assert len(job.events) == 2
    for event, *words in job.events:
        assert event == "began"
        options, (name, ours) = parse_torchrun(words)
        assert (name, ours["recipe"], ours["cache"]) == ("train", "beit", "cache")
        assert (options.nnodes, options.nproc_per_node) == ("2", "gpu")
        assert options.rdzv_endpoint == f"{os.uname().nodename}:{job.ports[0]}"
        assert options.rdzv_id == f"{job.number}.2"
        # It must end before Slurm ends it.
        notice_s = int(header_of(SCRIPTS / "train.sbatch")["signal"].partition("@")[2])
        assert options.shutdown_timeout < notice_s


def test_a_run_that_fails_fails_the_job(start, tmp_path):
    record(tmp_path, "torchrun", status=3)
    job = start(*TRAIN)
    assert job.process.wait(60) == 3
    assert not job.requeued.exists()


def test_shortly_before_the_end_training_is_stopped_and_the_job_put_back(start, tmp_path):
    record(tmp_path, "torchrun", lasts=True, on_sigterm=1)
    job = start(*TRAIN)
    job.wait_until(lambda: len(job.events) == 2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(60) == 1
    assert [event for event, *_ in job.events] == ["began", "began", "stopped", "stopped"]
    assert job.requeued.exists()
    assert "the run is saved" in job.output


def test_a_run_that_ends_well_in_its_last_minutes_is_not_put_back(start, tmp_path):
    record(tmp_path, "torchrun", lasts=True, on_sigterm=0)
    job = start(*TRAIN)
    job.wait_until(lambda: len(job.events) == 2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(60) == 0
    assert not job.requeued.exists()


def test_when_slurm_tells_the_steps_the_script_waits_for_them(start, tmp_path):
    record(tmp_path, "torchrun", lasts=True, on_sigterm=1)
    job = start(*TRAIN, num_nodes=1)
    job.wait_until(lambda: len(job.events) == 1)
    job.process.send_signal(signal.SIGTERM)
    # It does not pass the signal on, which would be a second one for the ranks.
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(0.5)
    assert [event for event, *_ in job.events] == ["began"]
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(60) == 1


def test_a_run_that_is_cancelled_ends_with_its_steps_and_is_not_put_back(start, tmp_path):
    record(tmp_path, "torchrun", lasts=True, on_sigterm=1)
    job = start(*TRAIN)
    job.wait_until(lambda: len(job.events) == 2)
    job.cancel(60)
    assert job.process.returncode == 1
    assert [event for event, *_ in job.events] == ["began", "began", "stopped", "stopped"]
    assert not job.requeued.exists()


BUILD = ("build.sbatch", "--images", "photos", "--codebook", "c.safetensors", "--out", "cache")


def began(job, program):
    return [words[:2] for words in job.events].count(["began", program])


def stopped(job):
    return sorted(program for event, program, *_ in job.events if event == "stopped")


def record_ray(folder):
    """Record `ray` by what it does: `ray start` lasts, `ray health-check` is content."""
    record(folder, "ray-start", lasts=True)
    record(folder, "ray-health-check")
    program = folder / "bin/ray"
    program.write_text('#!/bin/bash\nexec "ray-$1" "$@"\n')
    program.chmod(0o755)


@pytest.fixture
def ray(tmp_path):
    record_ray(tmp_path)


@pytest.mark.usefixtures("ray")
def test_a_build_gets_a_ray_cluster_of_all_nodes_which_ends_with_it(start, tmp_path):
    record(tmp_path, "patchcache", lasts=True)
    job = start(*BUILD, cpus=3)
    job.wait_until(lambda: began(job, "ray-start") == 2 and began(job, "patchcache"))
    job.process.terminate()
    assert job.process.wait(60) == 0
    head = f"{os.uname().nodename}:{job.ports[0]}"
    commands = [parse_ray(["ray", *words[2:]]) for words in job.events if words[2:3] != ["build"]]
    assert {told["address"] for name, told in commands if name == "health-check"} == {head}
    nodes = [told for name, told in commands if name == "start"]
    assert all(node["block"] and node["num_cpus"] == 3 for node in nodes)
    first, second = sorted(nodes[:2], key=lambda node: not node["head"])
    assert (first["port"], first["ray_client_server_port"]) == job.ports
    assert first["temp_dir"] == f"/tmp/ray-{job.number}"
    assert (second["head"], second["address"]) == (False, head)
    build = next(words for _, *words in job.events if words[0] == "patchcache")
    name, ours = parse_patchcache(build)
    assert (name, ours["ray_address"], ours["out"]) == ("build", head, "cache")


def test_builds_and_trainings_on_one_node_have_ports_of_their_own(tmp_path):
    folders = [tmp_path / name for name in ("build", "another", "train")]
    for folder in folders:
        folder.mkdir()
        record_ray(folder)
        record(folder, "patchcache", lasts=True)
        record(folder, "torchrun", lasts=True)
    heads, rendezvous = [], ""
    with started_jobs(folders.__getitem__) as start:
        for number, command in ((1234, BUILD), (1235, BUILD), (1236, TRAIN)):
            job = start(*command, num_nodes=1, number=number)
            program = "torchrun" if command is TRAIN else "ray-start"
            job.wait_until(lambda job=job, program=program: began(job, program))
            (words,) = [words[1:] for words in job.events if words[:2] == ["began", program]]
            if command is TRAIN:
                rendezvous = parse_torchrun(words)[0].rdzv_endpoint
            else:
                heads.append(parse_ray(["ray", *words[1:]])[1])
    ports = [head[name] for head in heads for name in ("port", "ray_client_server_port")]
    ports.append(int(rendezvous.rpartition(":")[2]))
    assert sorted(ports) == [22468, 22469, 22470, 22471, 22472]
    # Without a dashboard, and with its agent's port 0, Ray takes the others as they are free.
    assert all(head["include_dashboard"] is False for head in heads)
    assert all(head["dashboard_agent_listen_port"] == 0 for head in heads)


@pytest.mark.usefixtures("ray")
def test_a_build_that_fails_fails_the_job_and_leaves_no_cluster(start, tmp_path):
    record(tmp_path, "patchcache", status=1)
    job = start(*BUILD)
    assert job.process.wait(60) == 1
    assert not job.requeued.exists()


@pytest.mark.usefixtures("ray")
def test_shortly_before_the_end_a_build_is_stopped_and_the_job_put_back(start, tmp_path):
    record(tmp_path, "patchcache", lasts=True, on_sigterm=143)
    job = start(*BUILD)
    job.wait_until(lambda: began(job, "ray-start") == 2 and began(job, "patchcache"))
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(60) == 143
    assert job.requeued.exists()
    assert stopped(job) == ["patchcache", "ray-start", "ray-start"]


@pytest.mark.usefixtures("ray")
def test_a_preempted_build_is_stopped_and_left_to_slurm(start, tmp_path):
    record(tmp_path, "patchcache", lasts=True, on_sigterm=143)
    job = start(*BUILD, num_nodes=1)
    job.wait_until(lambda: began(job, "patchcache"))
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(60) == 143
    assert not job.requeued.exists()
    assert "patchcache" in stopped(job)


def test_a_head_node_that_does_not_start_ends_the_job(start, tmp_path):
    record(tmp_path, "ray", status=1)
    job = start(*BUILD)
    assert job.process.wait(60) == 1
    assert not began(job, "patchcache")


def test_hosts_without_a_scheduler_meet_at_the_one_that_is_named(tmp_path):
    record(tmp_path, "torchrun")
    (shown,) = shown_in(TORCHRUN, "./train.sh")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", TORCHRUN, "10.0.0.1:29400", "2", *shown[3:]]
    subprocess.run(command, env=environment, check=True)
    _, *words = json.loads((tmp_path / "commands").read_text())
    options, (name, _) = parse_torchrun(words)
    assert (options.rdzv_endpoint, options.nnodes, name) == ("10.0.0.1:29400", "2", "train")


def test_a_host_that_is_told_too_little_says_what_it_wants():
    done = subprocess.run(["bash", TORCHRUN, "a:1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: train.sh HOST:PORT NUM_HOSTS" in done.stderr
