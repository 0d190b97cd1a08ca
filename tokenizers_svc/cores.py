"""How many cores there are for the lanes of a CPU, and which of them each one runs on.

A lane computes without the interpreter's lock for a millisecond at a time; the event loop works in
between, and holds the lock while it does. Left alone, the kernel moves lanes after it from core to
core, away from the centroids in their caches, or lets a lane that wakes up push it aside in the
middle of its work, and then nobody gets on. So each lane stays where it is, if that can do no harm,
and pushes nobody.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def num_cores(
    groups: Path = Path("/proc/self/cgroup"), mounted_at: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return how many cores this process may use.

    By its CPU set and, on Linux, by the quotas of its control groups: with `docker run --cpus` and
    the limits of Kubernetes it sees every core and gets the time of a few.

    Args:
        groups: Where the kernel says in which groups this process is.
        mounted_at: Where the groups are.
    """
    in_set = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [math.ceil(quota) for quota in _quotas(groups, mounted_at)]
    return max(1, min([in_set or 1, *quotas]))


def _quotas(groups: Path, mounted_at: Path) -> Iterator[float]:
    """Give the quotas of this process's groups and of those around them, in cores."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number == "0":  # version 2 has one tree for everything
            tree = mounted_at
        elif "cpu" in controllers.split(","):
            tree = mounted_at / controllers
        else:
            continue
        # A container may see its own group as the root of the tree, under a name that is not there.
        group = tree / name.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                yield _quota(folder)
            if folder == tree:
                break


def _quota(folder: Path) -> float:
    """Return the quota of one group.

    Raises:
        OSError: It has none.
        ValueError: It is unlimited.
    """
    two = folder / "cpu.max"
    if two.exists():
        quota, period = two.read_text().split()
    else:
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
    cores = int(quota) / int(period)
    if cores <= 0:
        raise ValueError("no limit")
    return cores


def settle_lane(number: int, num_lanes: int, devices: Path = Path("/sys/devices")) -> None:
    """Bind the calling thread, lane `number` of `num_lanes`, to a core, if there is one for each.

    Where there are more cores than lanes, others may have started lanes on the first of them, and
    where cores are not alike, or two are one core with two threads, it matters which of them a few
    pictures go to: then the kernel knows better. Nothing happens on systems that cannot do this or
    do not allow it.

    Args:
        number: From 0.
        num_lanes: Of one tokenizer.
        devices: Where the kernel describes the cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with contextlib.suppress(OSError):
        # Its share of the core stays what it was; it takes it when the others let it.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) == num_lanes and _are_alike(cores, devices):
            os.sched_setaffinity(0, {cores[number]})


def _are_alike(cores: Sequence[int], devices: Path) -> bool:
    """Whether every one of these is a core of its own, and all are of one kind.

    Raises:
        OSError: The kernel does not say.
    """
    if (devices / "cpu_atom").exists():  # the smaller ones of two kinds, on x86
        return False
    capacities = set()
    for core in cores:
        folder = devices / "system/cpu" / f"cpu{core}"
        if (folder / "topology/thread_siblings_list").read_text().strip() != str(core):
            return False
        capacity = folder / "cpu_capacity"  # on ARM
        capacities.add(capacity.read_text() if capacity.exists() else "")
    return len(capacities) == 1
