"""How many cores there are for the lanes of a CPU, and which of them each one runs on."""

import asyncio
import os
import threading

import pytest

from tests.factories import write_folder
from tests.tokenizers_svc.support import WatchedTokenizer
from tests.tokenizers_svc.test_batcher import Started
from tokenizers_svc.cores import num_cores, settle_lane
from tokenizers_svc.pending import Crew

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system binds no threads to cores"
)
MINE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def settled(num_lanes, *, have_cores=True):
    """The cores and the policy of every lane at work."""
    crew = Crew(num_lanes, num_turns=num_lanes, torch_threads=1, have_cores=have_cores)

    async def scenario():
        gate = threading.Barrier(num_lanes)

        def look(_):
            gate.wait(20)  # every lane has one of these jobs
            return tuple(sorted(os.sched_getaffinity(0))), os.sched_getscheduler(0)

        async with Started(WatchedTokenizer(), crew=crew) as batcher:
            return await asyncio.gather(*(batcher.call(look) for _ in range(num_lanes)))

    lanes = asyncio.run(scenario())
    assert sorted(os.sched_getaffinity(0)) == MINE, "the other threads stay free"
    return sorted(lanes)


def settled_on(folder, content=None, siblings="{core}"):
    """The cores of the lanes, one for each of ours, on a machine that the kernel describes so."""
    described = {
        f"system/cpu/cpu{core}/topology/thread_siblings_list": siblings.format(core=core) + "\n"
        for core in MINE
    }
    write_folder(
        folder, {name: text.encode() for name, text in (described | (content or {})).items()}
    )
    found = []

    def settle(number):
        settle_lane(number, len(MINE), folder)
        found.append(tuple(sorted(os.sched_getaffinity(0))))

    for number in range(len(MINE)):
        thread = threading.Thread(target=settle, args=(number,))
        thread.start()
        thread.join()
    return found


def test_lanes_push_nobody_aside():
    assert {policy for _, policy in settled(len(MINE))} == {os.SCHED_BATCH}


def test_where_there_is_a_core_for_each_lane_it_stays_there(tmp_path):
    assert settled_on(tmp_path) == [(core,) for core in MINE]


@pytest.mark.skipif(len(MINE) < 2, reason="there is one core")
def test_where_there_are_more_cores_than_lanes_the_kernel_chooses():
    assert settled(len(MINE) - 1) == [(tuple(MINE), os.SCHED_BATCH)] * (len(MINE) - 1)


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param({"siblings": "{core},64"}, id="two threads of one core"),
        pytest.param({"content": {"cpu_atom/cpus": "8-15"}}, id="two kinds on x86"),
        pytest.param({"siblings": ""}, id="nothing is said"),
    ],
)
def test_where_cores_are_not_alike_the_kernel_chooses(tmp_path, machine):
    assert settled_on(tmp_path, **machine) == [tuple(MINE)] * len(MINE)


@pytest.mark.skipif(len(MINE) < 2, reason="there is one core")
def test_where_cores_differ_in_capacity_the_kernel_chooses(tmp_path):
    capacities = {f"system/cpu/cpu{core}/cpu_capacity": f"{core}" for core in MINE}
    assert settled_on(tmp_path, capacities) == [tuple(MINE)] * len(MINE)


def test_lanes_in_front_of_a_device_stay_as_they_are():
    everywhere = (tuple(MINE), os.sched_getscheduler(0))
    assert settled(len(MINE), have_cores=False) == [everywhere] * len(MINE)


def test_a_system_that_refuses_is_no_reason_to_stop(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    cores = {cores for cores, _ in settled(len(MINE))}
    assert cores == {tuple(MINE)}


def version_1(controllers, quota):
    """The kernel's files of a container that sees its own group as the root of the tree."""
    group = f"groups/{controllers}"
    return {
        "self": f"3:cpuset:/\n2:{controllers}:/docker/0a\n",
        f"{group}/cpu.cfs_quota_us": f"{quota}\n",
        f"{group}/cpu.cfs_period_us": "100000\n",
    }


def version_2(limit):
    """The kernel's files of a container."""
    return {"self": "0::/\n", "groups/cpu.max": f"{limit}\n"}


NESTED = {
    "self": "0::/a/b\n",
    "groups/a/cpu.max": "50000 100000\n",
    "groups/a/b/cpu.max": "max 100000\n",
}


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        pytest.param(version_2("100000 100000"), 1, id="a container"),
        pytest.param(NESTED, 1, id="a service within a slice"),
        pytest.param(version_1("cpu,cpuacct", 90000), 1, id="version 1"),
        pytest.param({}, len(MINE), id="no groups"),
        pytest.param({"self": "0::/\n"}, len(MINE), id="no quota"),
        pytest.param(version_2("max 100000"), len(MINE), id="no limit"),
        pytest.param(version_2(f"{len(MINE) + 1}00000 100000"), len(MINE), id="a high one"),
        pytest.param(version_2("what is this"), len(MINE), id="nonsense"),
        pytest.param(version_1("cpu", -1), len(MINE), id="no limit in version 1"),
    ],
)
def test_a_quota_of_cpu_time_counts_like_cores_and_adds_none(tmp_path, content, cores):
    write_folder(tmp_path, {name: text.encode() for name, text in content.items()})
    assert num_cores(tmp_path / "self", tmp_path / "groups") == cores
