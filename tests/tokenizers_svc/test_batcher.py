"""The batcher by itself, in an event loop of the test."""

import asyncio
import threading

import pytest

from tests.tokenizers_svc.support import (
    AllergicTokenizer,
    WatchedTokenizer,
    ids_of,
    make_views,
)
from tokenizers_svc.batcher import Batcher
from tokenizers_svc.workers import WorkerStoppedError

MAX_BATCH = 4


class Started:
    """A batcher that is ready, over a tokenizer whose warm-up is forgotten."""

    def __init__(self, tokenizer, linger_s=0.0, **options):
        self.tokenizer = tokenizer
        self.batcher = Batcher(lambda: tokenizer, max_batch=MAX_BATCH, linger_s=linger_s, **options)

    async def __aenter__(self):
        self.batcher.start()
        while not self.batcher.is_ready:
            await asyncio.sleep(0.005)
        assert self.tokenizer.batch_sizes == [1, MAX_BATCH]
        self.tokenizer.batch_sizes.clear()
        return self.batcher

    async def __aexit__(self, *error):
        self.tokenizer.may_run.set()
        await self.batcher.close()
        assert not self.batcher.is_alive


async def fill(batcher, tokenizer, num_pictures):
    """Hold one picture in the tokenizer and queue more behind it; returns all tasks."""
    tokenizer.may_run.clear()
    first = asyncio.ensure_future(batcher.encode(make_views(1)[0]))
    while not tokenizer.batch_sizes:
        await asyncio.sleep(0.002)
    views = make_views(num_pictures - 1, seed=1)
    return [first, *(asyncio.ensure_future(batcher.encode(view)) for view in views)]


def test_an_answer_is_that_of_the_library_and_says_what_it_cost():
    async def scenario():
        async with Started(WatchedTokenizer()) as batcher:
            view = make_views(1)[0]
            answer = await batcher.encode(view)
            assert answer.ids.tolist() == ids_of(view)
            assert 0 <= answer.queue_s < 1
            assert 0 < answer.infer_s < 1

    asyncio.run(scenario())


def test_what_waits_is_taken_first_come_first_served_up_to_a_full_batch():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 8)
            order = []
            for number, task in enumerate(tasks):
                task.add_done_callback(lambda _, number=number: order.append(number))
            await asyncio.sleep(0)
            tokenizer.may_run.set()
            await asyncio.gather(*tasks)
            await asyncio.sleep(0)
        assert tokenizer.batch_sizes == [1, 4, 3]
        assert order == list(range(8))

    asyncio.run(scenario())


def test_only_after_a_shared_batch_does_the_worker_wait_for_company():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer, linger_s=0.4) as batcher:
            one, two = make_views(2)
            await batcher.encode(one)
            late = asyncio.ensure_future(batcher.encode(one))
            await asyncio.sleep(0.03)
            await asyncio.gather(late, batcher.encode(two))
            assert tokenizer.batch_sizes == [1, 1, 1]  # alone before, so nobody is waited for
            tokenizer.batch_sizes.clear()
            tasks = await fill(batcher, tokenizer, 3)
            tokenizer.may_run.set()
            await asyncio.gather(*tasks)
            late = asyncio.ensure_future(batcher.encode(one))
            await asyncio.sleep(0.03)
            await asyncio.gather(late, batcher.encode(two))
            assert tokenizer.batch_sizes == [1, 2, 2]

    asyncio.run(scenario())


def test_a_cancelled_picture_leaves_the_queue_and_is_counted():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 4)
            await asyncio.sleep(0)
            tasks[2].cancel()
            tokenizer.may_run.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(o, asyncio.CancelledError) for o in outcomes] == [0, 0, 1, 0]
            assert batcher.stats().num_late == 1
        assert tokenizer.batch_sizes == [1, 2]

    asyncio.run(scenario())


def test_a_picture_cancelled_while_its_batch_runs_does_no_harm_to_its_neighbours():
    class Hesitant(WatchedTokenizer):
        may_finish = threading.Event()

        def encode(self, pixels):
            ids = super().encode(pixels)
            if len(pixels) == 3:
                assert self.may_finish.wait(20)
            return ids

    async def scenario():
        tokenizer = Hesitant()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 4)
            await asyncio.sleep(0)
            tokenizer.may_run.set()
            while len(tokenizer.batch_sizes) < 2:
                await asyncio.sleep(0.002)
            tasks[1].cancel()
            await asyncio.sleep(0)
            tokenizer.may_finish.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(o, asyncio.CancelledError) for o in outcomes] == [0, 1, 0, 0]
        assert tokenizer.batch_sizes == [1, 3]

    asyncio.run(scenario())


def test_closing_answers_what_was_let_in_and_refuses_the_rest():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 7)
            await asyncio.sleep(0)
            closing = asyncio.ensure_future(batcher.close())
            await asyncio.sleep(0.01)
            with pytest.raises(WorkerStoppedError):
                await batcher.encode(make_views(1)[0])
            tokenizer.may_run.set()
            assert len(await asyncio.gather(*tasks)) == 7
            await closing

    asyncio.run(scenario())


def test_closing_under_a_stuck_tokenizer_fails_what_waits_instead_of_hanging():
    async def scenario():
        tokenizer = WatchedTokenizer()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 3)
            await asyncio.sleep(0)
            await asyncio.wait_for(batcher.close(), 5)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, WorkerStoppedError) for outcome in outcomes)
            assert batcher.is_alive

    asyncio.run(scenario())


def test_a_tokenizer_that_cannot_be_loaded_is_never_ready_and_says_why():
    async def scenario():
        def load():
            raise ValueError("no such weights")

        batcher = Batcher(load, max_batch=1)
        batcher.start()
        while batcher.failure is None:
            await asyncio.sleep(0.005)
        assert str(batcher.failure) == "no such weights"
        assert not batcher.is_ready
        with pytest.raises(WorkerStoppedError):
            await batcher.encode(make_views(1)[0])
        await batcher.close()

    asyncio.run(scenario())


def test_a_tokenizer_that_loses_a_picture_fails_rather_than_mixing_answers_up():
    class Forgetful(WatchedTokenizer):
        def encode(self, pixels):
            ids = super().encode(pixels)
            return ids[:-1] if len(ids) in (2, 3) else ids

    async def scenario():
        tokenizer = Forgetful()
        async with Started(tokenizer) as batcher:
            tasks = await fill(batcher, tokenizer, 4)
            await asyncio.sleep(0)
            tokenizer.may_run.set()
            answers = await asyncio.gather(*tasks)
            views = [make_views(1)[0], *make_views(3, seed=1)]
            for view, answer in zip(views, answers, strict=True):
                assert answer.ids.tolist() == ids_of(view)
        assert tokenizer.batch_sizes == [1, 3, 1, 1, 1]

    asyncio.run(scenario())


def test_the_tokenizer_is_loaded_and_run_in_one_thread_of_its_own():
    threads = set()

    class Native(AllergicTokenizer):
        def encode(self, pixels):
            threads.add(threading.current_thread().name)
            return super().encode(pixels)

    async def scenario():
        async with Started(Native()) as batcher:
            await batcher.encode(make_views(1)[0])

    asyncio.run(scenario())
    assert threads == {"tokenizer-0"}
