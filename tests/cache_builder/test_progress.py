"""Progress of a build: rates of this run and of every node, and how long it will still take."""

import pytest

from cache_builder import progress
from cache_builder.build_log import UnitWork
from cache_builder.build_worker import UnitReport
from cache_builder.measures import duration_text, size_text
from cache_builder.progress import BuildProgress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def report(unit, node="a/1", seconds=10.0, *, was_there=False, num_samples=100, num_skipped=0):
    return UnitReport(
        unit=unit,
        num_samples=num_samples,
        num_skipped=num_skipped,
        num_views=4 * num_samples,
        bytes=5_000_000,
        was_there=was_there,
        summaries=(),
        work=None if was_there else UnitWork("host", 1, "cpu", seconds, bytes_read=10_000_000),
        node=node,
        seconds=seconds,
    )


def test_after_a_resume_the_rate_and_the_time_left_are_those_of_this_run_alone(clock, capsys):
    with BuildProgress() as progress:
        for unit in range(50):  # looked through in no time
            clock.now_s += 0.2
            progress.unit_done(report(unit, seconds=0.2, was_there=True), 10_000)
        for unit in range(50, 53):
            clock.now_s += 10
            progress.unit_done(report(unit, num_samples=98, num_skipped=2), 10_000)
    lines = capsys.readouterr().err.splitlines()
    # 300 of 5,000 images in 30 s, so 4,700 take 470 s.
    assert lines[-2] == (
        "building 5,300/10,000 images, 9.8 images/s, 39.2 views/s, 1.0 MB/s read, 6 skipped, "
        "eta 7 min 50 s"
    )
    assert lines[-1] == (
        "built        294 images in 30 s: 9.8 images/s, 39.2 views/s, 1.0 MB/s read"
    )


def test_every_node_has_its_own_rate_from_its_first_unit_on(clock, capsys):
    with BuildProgress() as progress:
        for unit in range(10):
            clock.now_s += 4
            if unit >= 5:  # this node came later and is twice as fast
                progress.unit_done(report(2 * unit + 1, "b/2", num_samples=200), 10_000)
            clock.now_s += 6
            progress.unit_done(report(2 * unit, "a/1"), 10_000)
    lines = capsys.readouterr().err.splitlines()
    # 8,000 images are left for 10 + 1000 / 56 images/s.
    assert lines[-4].endswith("(a/1 10.0/s, b/2 17.9/s), eta 4 min 47 s")
    assert lines[-3].startswith("built        2,000 images in 1 min 40 s: 20.0 images/s")
    assert lines[-2].startswith("on node      a/1  1,000 images, 10.0 images/s, 40.0 views/s")
    assert lines[-1].startswith("on node      b/2  1,000 images, 20.0 images/s, 80.0 views/s")


def test_a_build_that_found_everything_there_has_no_rate(clock, capsys):
    with BuildProgress() as progress:
        progress.unit_done(report(0, was_there=True), 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_stop_says_how_much_is_kept(clock, capsys, error):
    with pytest.raises(error), BuildProgress() as progress:
        progress.unit_done(report(0), 1000)
        raise error
    assert capsys.readouterr().err == (
        "stopped after 100 of 1,000 images; 1 finished units are kept\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (65, "1 min 05 s"), (3600, "1 h 00 min"), (1e6, "277 h 46 min")],
)
def test_a_time_is_written_as_a_person_reads_it(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (999_940, "999.9 kB"), (999_960, "1.0 MB"),
     (1e13, "10.0 TB")],
)  # fmt: skip
def test_a_size_is_written_as_a_person_reads_it(num_bytes, text):
    assert size_text(num_bytes) == text
