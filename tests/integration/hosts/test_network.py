"""The hosts of these tests are apart as machines are, and leave nothing behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import builds
from tests.integration.hosts import network

pytestmark = pytest.mark.usefixtures("hosts_are_possible")

ASK = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2])).read().decode())
"""
DIE_WITH_HOSTS = """
import os, signal
from tests.integration.hosts.network import network
with network("one") as (one,):
    print(one.namespace, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def ask(host, url, timeout_s=20):
    words = [*host.entering(), sys.executable, "-c", ASK, url, str(timeout_s)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_hosts_find_each_other_by_name_until_a_cable_is_pulled(tmp_path):
    (tmp_path / "word").write_text("hello")
    with network.network("one", "two") as (one, two):
        server = one.start_python(
            ["-m", "http.server", "8000", "-d", tmp_path], tmp_path / "server.log"
        )
        builds.wait_for(lambda: ask(two, "http://one:8000/word").stdout == "hello\n")
        one.pull_cable()
        answer = ask(two, "http://one:8000/word", 0.5)
        assert "timed out" in answer.stderr
        assert server.poll() is None
        one.plug_in()
        builds.wait_for(lambda: ask(two, "http://one:8000/word").stdout == "hello\n")
    assert server.wait(builds.TIMEOUT_S) == -signal.SIGKILL


def test_a_host_has_a_name_and_places_of_its_own(tmp_path):
    shared = tmp_path / "shared"
    with network.network("one", "two") as hosts:
        for host in hosts:
            host.give_place(shared, tmp_path / host.name)
            script = f"hostname > {shared}/name"
            assert host.start(["sh", "-c", script], tmp_path / "log").wait(builds.TIMEOUT_S) == 0
    assert list(shared.iterdir()) == []
    assert [(tmp_path / name / "name").read_text() for name in ("one", "two")] == ["one\n", "two\n"]


def test_what_a_killed_process_has_left_is_swept_away(tmp_path):
    words = [sys.executable, "-c", DIE_WITH_HOSTS]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    namespace = ended.stdout.strip()
    assert Path("/run/netns", namespace).exists()
    network.sweep()
    assert not Path("/run/netns", namespace).exists()
    assert not Path("/etc/netns", namespace).exists()
    assert not Path("/sys/class/net", namespace.partition("-")[0]).exists()
