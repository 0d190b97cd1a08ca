"""Work on Ray: every unit is done, errors keep their class, and a dead worker loses nothing."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cache_builder.errors import ConfigError, SourceError, WorkerLostError
from cache_builder.ray_cluster import Cluster, ClusterOptions
from cache_builder.ray_groups import actor_group
from cache_builder.ray_jobs import map_units

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ONE = ClusterOptions(num_workers=1)


class TellsWhoItIs:
    def run(self, unit):
        import torch

        time.sleep(0.02)
        return unit, os.getpid(), torch.get_num_threads()


class LeavesItsNumber:
    """Leaves the number of its process when it is made."""

    def __init__(self, folder):
        (Path(folder) / str(os.getpid())).touch()

    def run(self, unit):
        return unit


class Fails:
    def __init__(self, error):
        self.error = error

    def run(self, unit):
        if unit == 1:
            raise self.error
        return unit


class DiesOnce:
    """Kills its own process in the middle of unit 3, the first time."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, unit):
        marker = self.folder / "died"
        if unit == 3 and not marker.exists():
            marker.touch()
            os._exit(1)
        (self.folder / f"{unit}.done").touch()
        return unit


def raise_error(error):
    raise error


def test_a_generator_of_units_is_done_completely_and_not_faster_than_the_work():
    # A generator that is closed after its first unit would end the job early and silently.
    taken = []

    def units():
        for unit in range(40):
            taken.append(unit)
            yield unit

    results = []
    # Three workers on two CPUs: a machine may have fewer CPUs than there are GPUs to feed.
    for finished in map_units(TellsWhoItIs, units(), ClusterOptions(num_workers=3)):
        results.append(finished.result)
        # Two units in flight for each worker, and one that waits.
        assert len(taken) <= len(results) + 3 * 3
    assert sorted(unit for unit, _, _ in results) == list(range(40))
    assert {threads for _, _, threads in results} == {1}


def test_there_are_never_more_workers_than_units(tmp_path):
    made = partial(LeavesItsNumber, str(tmp_path))
    results = list(map_units(made, range(2), ClusterOptions(num_workers=100)))
    assert sorted(finished.result for finished in results) == [0, 1]
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


def test_a_job_that_asks_for_what_this_machine_lacks_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"^--gpus-per-worker 64 finds no place: Ray sees 2 CPUs"):
        list(map_units(TellsWhoItIs, range(2), ClusterOptions(gpus_per_worker=64)))
    with pytest.raises(ConfigError, match=r"^--gpus-per-worker is a share of one GPU.*not 1\.5\."):
        list(map_units(TellsWhoItIs, range(2), ClusterOptions(gpus_per_worker=1.5)))
    with pytest.raises(ConfigError, match=r"^--cpus-per-worker must be above 0, not 0\."):
        list(map_units(TellsWhoItIs, range(2), ClusterOptions(cpus_per_worker=0)))


def test_workers_of_two_cpus_are_half_as_many_and_may_keep_two_threads_busy(tmp_path):
    options = ClusterOptions(cpus_per_worker=2)
    made = partial(LeavesItsNumber, str(tmp_path))
    assert len(list(map_units(made, range(6), options))) == 6
    assert len(list(tmp_path.iterdir())) == 1
    assert options.threads_per_worker == 2
    assert ClusterOptions(cpus_per_worker=0.5).threads_per_worker == 1


def test_every_member_of_a_group_finds_a_place_on_nodes_of_one_cpu_each():
    class ThreeNodes(Cluster):
        def __init__(self, *sizes):
            self.sizes = sizes

        def _nodes(self):
            return [{"CPU": size} for size in self.sizes]

    assert ThreeNodes(1, 1, 1).cpus_for_each(3, 1) == 1
    assert ThreeNodes(1, 1, 1).cpus_for_each(4, 1) == 0.5  # not 3/4: three would find a place
    assert ThreeNodes(4, 1).cpus_for_each(3, 2) == pytest.approx(4 / 3)
    assert ThreeNodes(8).cpus_for_each(2, 3) == 3
    assert ThreeNodes(0, 2).cpus_for_each(5, 1) == 0.4


def test_no_units_are_no_work():
    assert list(map_units(TellsWhoItIs, iter(()), ONE)) == []


@pytest.mark.parametrize("error", [SourceError("the disk is gone"), PermissionError(13, "denied")])
def test_an_error_that_a_user_can_mend_reaches_the_caller_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        list(map_units(partial(Fails, error), range(5), ONE))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


def test_an_error_while_a_worker_is_made_reaches_the_caller_as_it_is():
    with pytest.raises(SourceError, match=r"^no weights here$"):
        list(map_units(partial(raise_error, SourceError("no weights here")), range(3), ONE))


def test_a_bug_keeps_its_traceback_and_the_next_job_works():
    with pytest.raises(ZeroDivisionError, match=r"in run"):
        list(map_units(partial(Fails, ZeroDivisionError("a bug")), range(5), ONE))
    results = map_units(TellsWhoItIs, range(5), ONE)
    assert next(results).result[0] == 0
    results.close()  # a caller may stop in the middle


def test_a_worker_that_dies_is_restarted_and_nothing_is_lost(tmp_path):
    results = list(map_units(partial(DiesOnce, str(tmp_path)), range(10), ONE))
    assert (tmp_path / "died").exists()
    assert sorted(finished.result for finished in results) == list(range(10))
    assert {path.stem for path in tmp_path.glob("*.done")} == {str(unit) for unit in range(10)}


class Counter:
    """Holds a number in a process of its own."""

    def __init__(self, start=0):
        self.value = start

    def add(self, number):
        self.value += number
        return self.value

    def total(self, array):
        return float(array.sum())

    def fail(self):
        raise ConfigError("no such thing")

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_group_of_actors_keeps_what_it_knows_and_answers_in_order():
    makers = [partial(Counter, start) for start in (10, 20, 30)]
    with actor_group(makers, ClusterOptions()) as group:
        assert group.call("add", [(1,), (2,), (3,)]) == [11, 22, 33]
        assert group.call("add", [(0,), (0,), (0,)]) == [11, 22, 33]
        large = np.ones(1_000_000)
        assert group.call("total", [(large,)] * 3) == [1e6] * 3
        assert group.call_one(1, "add", 5) == 27
        with pytest.raises(ConfigError, match="no such thing"):
            group.call("fail", [()] * 3)


def test_an_actor_that_dies_with_its_share_is_named():
    with actor_group([Counter, Counter], ClusterOptions()) as group:
        with pytest.raises(WorkerLostError, match="A Ray actor that held a share of the work died"):
            group.call_one(0, "die")
        assert group.call_one(1, "add", 1) == 1
