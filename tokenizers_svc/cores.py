"""Which cores the lanes of a CPU run on.

A lane computes without the interpreter's lock for a millisecond at a time; the event loop works in
between, and holds the lock while it does. Left alone, the kernel moves lanes after it from core to
core, away from the centroids in their caches, or lets a lane that wakes up push it aside in the
middle of its work, and then nobody gets on. So each lane stays where it is, and pushes nobody.
"""

import contextlib
import os


def settle_lane(number: int, num_lanes: int) -> None:
    """Bind the calling thread, lane `number` of `num_lanes`, to a core, if there is one for each.

    Where there are more cores than lanes, others may have started lanes on the first of them, and
    the kernel knows better. Nothing happens on systems that cannot do this or do not allow it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with contextlib.suppress(OSError):
        # Its share of the core stays what it was; it takes it when the others let it.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) == num_lanes:
            os.sched_setaffinity(0, {cores[number]})
