"""Lanes, decoders and what they take: several threads in front of one tokenizer."""

import asyncio
import threading
import time
import weakref

import pytest
import torch

from tests.tokenizers_svc.support import WatchedTokenizer, ids_in, ids_of, make_views
from tests.tokenizers_svc.test_batcher import MAX_BATCH, Started, fill
from tokenizers_svc.batch_reports import BatchReport
from tokenizers_svc.encoding import encode_batch
from tokenizers_svc.pace import Pace
from tokenizers_svc.pending import Crew, Item, Lane, Pending
from tokenizers_svc.workers import DeadlinePassedError, WorkerStoppedError

TWO_LANES = Crew(num_lanes=2, num_turns=2, torch_threads=1)
TAKING_TURNS = Crew(num_lanes=2, num_turns=1)


async def until(is_so):
    """Let other threads work until something is so."""
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


def pending_views(num_views, *, crew, max_batch=MAX_BATCH, linger_s=0):
    """Queues with views in them, and no threads."""
    pending = Pending(crew, max_batch=max_batch, linger_s=linger_s)
    for view in make_views(num_views):
        with pending.lock:
            pending.add(Item(None, float("inf"), pixels=view))
    return pending


def gathered(pending):
    """A lane after it has gathered."""
    lane = Lane()
    lane.allocate(8, 32, torch.device("cpu"))
    assert pending.next_for_lane() == "batch"
    pending.gather(lane)
    return lane


def test_lanes_run_batches_at_the_same_time():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer, crew=TWO_LANES) as batcher:
            tokenizer.may_run.clear()
            one, two = make_views(2)
            first = asyncio.ensure_future(batcher.encode(one))
            await until(lambda: len(tokenizer.batch_sizes) == 1)
            second = asyncio.ensure_future(batcher.encode(two))
            await until(lambda: len(tokenizer.batch_sizes) == 2)
            tokenizer.may_run.set()
            assert ids_in([await first, await second]) == [ids_of(one), ids_of(two)]

    asyncio.run(scenario())


def test_pictures_that_come_one_by_one_have_the_lane_whose_caches_are_warm():
    async def scenario():
        async with Started(WatchedTokenizer(), crew=Crew(num_lanes=3, num_turns=3)) as batcher:
            everyone = threading.Barrier(3)  # a lane that is still to come would be the last
            await asyncio.gather(*(batcher.call(lambda _: everyone.wait(20)) for _ in range(3)))
            lanes = []
            for _ in range(12):
                await asyncio.sleep(0.01)  # until they are asleep again
                lanes.append(await batcher.call(lambda _: threading.current_thread().name))
            return lanes

    assert len(set(asyncio.run(scenario()))) == 1


def test_lanes_take_of_a_few_pictures_one_at_a_time():
    pending = pending_views(4, crew=TWO_LANES, max_batch=8)
    first, second = gathered(pending), gathered(pending)
    assert torch.equal(torch.cat([first.batch(), second.batch()]), make_views(4)[:2])
    assert pending.num_waiting == 2


def test_a_lane_takes_half_its_share_while_less_than_half_a_batch_waits_for_each():
    pending = pending_views(7, crew=TWO_LANES, max_batch=8)
    sizes = []
    while pending.num_waiting:
        lane = gathered(pending)
        sizes.append(len(lane.items))
        pending.return_turn(lane)
    assert sizes == [2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("num_lanes", "num_waiting", "taken"),
    [(2, 8, 6), (2, 9, 7), (2, 10, 8), (2, 28, 8), (8, 8, 1), (8, 31, 2), (8, 32, 6), (8, 64, 8)],
)
def test_of_a_backlog_a_lane_takes_more_than_its_share(num_lanes, num_waiting, taken):
    crew = Crew(num_lanes, num_turns=num_lanes)
    assert len(gathered(pending_views(num_waiting, crew=crew, max_batch=8)).items) == taken


def test_a_lane_that_has_its_share_does_not_linger_while_others_wait():
    pending = pending_views(7, crew=TWO_LANES, max_batch=8, linger_s=30)
    assert len(gathered(pending).items) == 2
    started = time.monotonic()
    assert len(gathered(pending).items) == 2
    assert time.monotonic() - started < 10


def test_files_that_are_not_decoded_yet_count_for_the_share_and_are_decoded_no_further_than_it():
    pending = Pending(TWO_LANES, max_batch=16, linger_s=0)
    with pending.lock:
        for view in make_views(8):
            pending.add(Item(None, float("inf"), cut=lambda view=view: view))
    for _ in range(2):
        item = pending.next_for_lane()
        item.pixels = item.cut()
        pending.put_back(item)
    assert [len(pending.views), len(pending.undecoded)] == [2, 6]
    assert len(gathered(pending).items) == 2


def test_a_lane_alone_takes_a_full_batch_in_the_order_of_arrival():
    pending = pending_views(6, crew=Crew())
    assert torch.equal(gathered(pending).batch(), make_views(6)[:MAX_BATCH])


def test_the_next_batch_grows_while_the_device_is_busy_and_never_joins_it():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer, crew=TAKING_TURNS) as batcher:
            tasks = await fill(batcher, tokenizer, 2)
            await until(lambda: batcher.stats().num_running == 2)
            later = [asyncio.ensure_future(batcher.encode(view)) for view in make_views(2, 5)]
            await until(lambda: batcher.stats().num_running == 4)
            assert tokenizer.batch_sizes == [1]
            tokenizer.may_run.set()
            answers = await asyncio.gather(*tasks, *later)
            views = [*make_views(1), *make_views(1, 1), *make_views(2, 5)]
            assert ids_in(answers) == [ids_of(view) for view in views]
            assert [answer.batch_size for answer in answers] == [1, 3, 3, 3]
        assert tokenizer.batch_sizes == [1, 3]

    asyncio.run(scenario())


def test_a_picture_that_leaves_a_batch_before_its_turn_is_not_tokenised():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer, crew=TAKING_TURNS) as batcher:
            tasks = await fill(batcher, tokenizer, 4)
            await until(lambda: batcher.stats().num_running == 4)
            tasks[1].cancel()
            await asyncio.sleep(0)
            tokenizer.may_run.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            views = make_views(3, seed=1)
            assert ids_in(answers[2:]) == [ids_of(view) for view in views[1:]]
            assert batcher.stats().num_late == 1
        assert tokenizer.batch_sizes == [1, 2]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("crew", "thread"), [(TWO_LANES, "tokenizer-"), (Crew(num_decoders=2), "tokenizer-decode-")]
)
def test_files_are_decoded_in_threads_and_a_bad_one_fails_alone(crew, thread):
    names = []

    def good(view):
        names.append(threading.current_thread().name)
        return view

    def bad():
        raise ValueError("not a picture")

    async def scenario():
        async with Started(WatchedTokenizer(), crew=crew) as batcher:
            views = make_views(3)
            work = [batcher.tokenize(lambda view=view: good(view)) for view in views]
            *answers, failure = await asyncio.gather(
                *work, batcher.tokenize(bad), return_exceptions=True
            )
            assert ids_in(answers) == [ids_of(view) for view in views]
            assert all(answer.decode_s > 0 and answer.queue_s >= 0 for answer in answers)
            assert str(failure) == "not a picture"

    asyncio.run(scenario())
    assert len(names) == 3
    assert all(name.startswith(thread) for name in names)


def test_a_file_whose_client_has_gone_is_not_decoded():
    decoded = []

    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 1)
            leaving = asyncio.ensure_future(batcher.tokenize(lambda: decoded.append(1)))
            await until(lambda: batcher.stats().num_undecoded == 1)
            leaving.cancel()
            await asyncio.wait([leaving])
            assert batcher.num_waiting == 0
            tokenizer.may_run.set()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert not decoded


def test_what_has_waited_too_long_is_dropped_decoded_or_not():
    decoded = []

    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 1)
            past = time.perf_counter()
            late = [
                asyncio.ensure_future(batcher.encode(make_views(1)[0], deadline=past)),
                asyncio.ensure_future(batcher.tokenize(lambda: decoded.append(1), deadline=past)),
            ]
            await until(lambda: batcher.num_waiting == 2)
            tokenizer.may_run.set()
            await asyncio.gather(*tasks)
            for task in late:
                with pytest.raises(DeadlinePassedError):
                    await task
            assert batcher.stats().num_late == 2
        assert tokenizer.batch_sizes == [1]

    asyncio.run(scenario())
    assert not decoded


def test_where_memory_is_short_batches_are_halved_from_there_on(caplog):
    class Small(WatchedTokenizer):
        is_full = False

        def encode(self, pixels):
            ids = super().encode(pixels)
            if self.is_full and len(pixels) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return ids

    async def scenario():
        tokenizer = Small()
        async with Started(tokenizer) as batcher:
            tokenizer.is_full = True
            for seed in (1, 2):
                tasks = await fill(batcher, tokenizer, 5)
                await asyncio.sleep(0)
                tokenizer.may_run.set()
                answers = await asyncio.gather(*tasks)
                views = [*make_views(1), *make_views(4, seed=1)]
                assert ids_in(answers) == [ids_of(view) for view in views]
                assert tokenizer.batch_sizes == ([1, 4, 2, 2] if seed == 1 else [1, 2, 2])
                assert batcher.stats().max_batch == 2
                tokenizer.batch_sizes.clear()

    asyncio.run(scenario())
    assert "going on with 2 at a time" in caplog.text


def test_what_a_run_without_memory_had_allocated_is_free_before_its_halves_run():
    class Hungry(WatchedTokenizer):
        def __init__(self):
            super().__init__()
            self.allocated, self.num_held = [], []

        def encode(self, pixels):
            self.num_held.append(sum(known() is not None for known in self.allocated))
            activations = torch.empty(len(pixels))
            self.allocated.append(weakref.ref(activations))
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().encode(pixels)

    tokenizer = Hungry()
    encoded = encode_batch(tokenizer, torch.stack([*make_views(5)]), [None] * 5)
    assert ids_in(encoded.outcomes) == [ids_of(view) for view in make_views(5)]
    assert tokenizer.batch_sizes == [2, 1, 2]  # of 5 and of 3 there was no memory
    assert tokenizer.num_held == [0] * 5


def test_a_job_runs_in_a_lane_and_what_it_raises_is_its_callers():
    def fail(tokenizer):
        raise KeyError("nothing")

    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer, crew=TWO_LANES) as batcher:
            name = await batcher.call(lambda _: threading.current_thread().name)
            assert name.startswith("tokenizer-")
            assert await batcher.call(lambda given: given is tokenizer)
            with pytest.raises(KeyError):
                await batcher.call(fail)
            assert (await batcher.encode(make_views(1)[0])).batch_size == 1

    asyncio.run(scenario())


def test_a_lane_that_dies_ends_the_others_and_everything_that_waits():
    class Lost(WatchedTokenizer):
        is_lost = False

        def encode(self, pixels):
            if self.is_lost:
                raise RuntimeError("device lost")
            return super().encode(pixels)

    async def scenario():
        tokenizer = Lost()
        async with Started(tokenizer, crew=TWO_LANES) as batcher:
            assert batcher.stats().num_lanes_alive == 2
            tokenizer.is_lost = True
            with pytest.raises(WorkerStoppedError):
                await batcher.encode(make_views(1)[0])
            await until(lambda: batcher.stats().num_lanes_alive == 0)
            assert str(batcher.failure) == "device lost"
            with pytest.raises(WorkerStoppedError):
                await batcher.tokenize(lambda: make_views(1)[0])

    asyncio.run(scenario())


def test_batches_are_counted_and_reported():
    reports: list[BatchReport] = []

    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer, on_batch=reports.append) as batcher:
            tasks = await fill(batcher, tokenizer, 4)
            await until(lambda: batcher.stats().num_views == 3)
            stats = batcher.stats()
            assert (stats.num_running, stats.num_undecoded, stats.num_batches) == (1, 0, 0)
            assert stats.busy_s[0] > 0
            assert batcher.seconds_per_picture > 0
            tokenizer.may_run.set()
            await asyncio.gather(*tasks)
            await until(lambda: len(reports) == 2)
            stats = batcher.stats()
            assert (stats.num_batches, stats.num_late) == (2, 0)

    asyncio.run(scenario())
    assert [report.num_pictures for report in reports] == [1, 3]
    assert [len(report.queue_s) for report in reports] == [1, 3]


def test_the_pace_tells_what_a_batch_costs_from_what_a_picture_costs():
    pace = Pace()
    assert pace.predict(10, 4) == 0
    for size in [1, 8, 3, 5] * 20:
        pace.learn(size, 0.005 + 0.002 * size)
    assert pace.per_batch_s == pytest.approx(0.005)
    assert pace.per_picture_s == pytest.approx(0.002)
    assert pace.predict(10, 4) == pytest.approx(3 * 0.005 + 10 * 0.002)


def test_batches_of_one_size_count_as_what_their_pictures_cost():
    pace = Pace()
    for _ in range(5):
        pace.learn(4, 0.02)
    assert pace.predict(8, 4) == pytest.approx(0.04)
