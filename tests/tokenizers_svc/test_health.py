"""When the watchdog calls a model stuck."""

from tests.tokenizers_svc.observed import MODEL
from tokenizers_svc.health import Watchdog


def test_the_watchdog_notices_a_model_that_has_work_and_gets_nothing_done():
    now = [0.0]
    watchdog = Watchdog(30, lambda: now[0])
    steps = [
        (0, 0, 7, None),  # time, pictures, batches ended so far, complaint
        (100, 0, 7, None),  # nothing to do
        (101, 5, 7, None),
        (130, 5, 7, None),
        (131, 5, 8, None),  # slow, but it works
        (160, 5, 8, None),
        (162, 5, 8, "The model tiny has ended no batch for 31 s while 5 pictures wait for it."),
    ]
    for moment, num_waiting, num_batches, complaint in steps:
        now[0] = moment
        state = MODEL._replace(num_waiting=num_waiting, num_running=0, num_batches=num_batches)
        assert watchdog.complaint([state]) == complaint, moment


def test_a_watchdog_that_is_seldom_asked_does_not_complain_of_work_that_has_just_come():
    now = [0.0]
    watchdog = Watchdog(30, lambda: now[0])
    idle, busy = MODEL._replace(num_waiting=0, num_running=0), MODEL._replace(num_running=1)
    for moment, state in [(0, busy), (20, idle), (60, busy), (90, busy)]:
        now[0] = moment
        assert watchdog.complaint([state]) is None, moment
    now[0] = 91
    assert "for 31 s" in watchdog.complaint([busy])


def test_the_watchdog_lets_a_model_take_its_time_to_load():
    now = [0.0]
    watchdog = Watchdog(30, lambda: now[0])
    loading = MODEL._replace(is_ready=False)
    assert watchdog.complaint([loading]) is None
    now[0] = 1000
    assert watchdog.complaint([loading]) is None
    assert watchdog.complaint([MODEL]) is None
