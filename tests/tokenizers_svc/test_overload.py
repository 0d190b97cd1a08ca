"""Many clients at once: batches, the queue, deadlines, clients that leave."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.requests import Request

from tests.tokenizers_svc.support import (
    RED,
    AllergicTokenizer,
    MortalTokenizer,
    WatchedTokenizer,
    check_problem,
    expected_ids,
    jpeg,
    open_request,
    post,
    read_answer,
    serving,
    wait_until,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.exchange import time_allowed
from tokenizers_svc.limits import Limits


class Held:
    """A service whose tokenizer holds one picture until it is released."""

    def __init__(self, tokenizer, client, pool):
        self.tokenizer, self.client, self.pool = tokenizer, client, pool
        self.service = client.service
        self.num_warm_up = len(tokenizer.batch_sizes)

    def post(self, body, **options):
        return self.pool.submit(post, self.client, body, **options)

    def num_places_taken(self):
        return self.service.door.num_pictures

    def num_waiting(self):
        return self.service.registry.default.batcher.num_waiting

    def batch_sizes(self):
        return self.tokenizer.batch_sizes[self.num_warm_up :]

    def hold(self, body):
        """Send a picture that occupies the tokenizer until `release`."""
        self.tokenizer.may_run.clear()
        answer = self.post(body)
        wait_until(lambda: len(self.batch_sizes()) == 1)
        return answer

    def release(self):
        self.tokenizer.may_run.set()


@contextlib.contextmanager
def held(tokenizer, **limits):
    # Equal pictures are sent on purpose; each is to be tokenised.
    app = create_app(tokenizer, limits=Limits(kept_bytes=0, lanes=1, **limits))
    with serving(app) as client, ThreadPoolExecutor(32) as pool:
        client.service = app.state.service
        try:
            yield Held(tokenizer, client, pool)
        finally:
            tokenizer.may_run.set()


def test_requests_of_many_clients_share_batches_and_each_gets_its_own_answer():
    with held(WatchedTokenizer(), max_batch=4, max_queue=32) as service:
        bodies = [jpeg(seed=seed) for seed in range(10)]
        first = service.hold(bodies[0])
        others = [service.post(body) for body in bodies[1:]]
        wait_until(lambda: service.num_waiting() == 9)
        service.release()
        for body, answer in zip(bodies, [first, *others], strict=True):
            assert answer.result().json()["token_ids"] == expected_ids(body)
        assert service.batch_sizes() == [1, 4, 4, 1]


def test_a_full_service_refuses_at_once_and_says_when_to_come_back():
    with held(WatchedTokenizer(), max_batch=1, max_queue=2) as service:
        answers = [service.hold(jpeg()), service.post(jpeg())]
        wait_until(lambda: service.num_places_taken() == 2)
        refused = post(service.client, jpeg())
        assert check_problem(refused, 429, "overloaded")["limit"] == 2
        assert int(refused.headers["retry-after"]) >= 1
        assert service.client.get("/readyz").status_code == 200
        service.release()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert post(service.client, jpeg()).status_code == 200


def test_a_full_service_refuses_before_it_reads_the_body():
    with held(WatchedTokenizer(), max_batch=1, max_queue=1) as service:
        answer = service.hold(jpeg())
        status, _ = read_answer(open_request(service.client, jpeg(), num_sent=0))
        assert status == 429
        service.release()
        assert answer.result().status_code == 200


def test_refused_and_failed_pictures_give_their_places_back():
    with held(WatchedTokenizer(), max_queue=2) as service:
        for _ in range(5):
            check_problem(post(service.client, b"not a picture"), 415, "not-an-image")
        assert post(service.client, jpeg()).status_code == 200
        assert service.num_places_taken() == 0


def test_a_client_that_hangs_up_frees_its_place_and_is_not_tokenised():
    with held(WatchedTokenizer(), max_batch=1, max_queue=2) as service:
        staying = service.hold(jpeg())
        leaving = open_request(service.client, jpeg())
        wait_until(lambda: service.num_waiting() == 1)
        check_problem(post(service.client, jpeg()), 429, "overloaded")
        leaving.close()
        wait_until(lambda: service.num_places_taken() == 1)
        wait_until(lambda: service.num_waiting() == 0)
        taking_over = service.post(jpeg(seed=1))
        wait_until(lambda: service.num_waiting() == 1)
        service.release()
        assert staying.result().status_code == 200
        assert taking_over.result().status_code == 200
        assert service.batch_sizes() == [1, 1]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_frees_its_place():
    with held(WatchedTokenizer(), max_queue=1) as service:
        leaving = open_request(service.client, jpeg(), num_sent=100)
        wait_until(lambda: service.num_places_taken() == 1)
        leaving.close()
        wait_until(lambda: service.num_places_taken() == 0)
        assert post(service.client, jpeg()).status_code == 200


def test_a_client_that_hangs_up_while_its_batch_runs_harms_nobody():
    with held(WatchedTokenizer(), max_batch=2, max_queue=4) as service:
        service.tokenizer.may_run.clear()
        leaving = open_request(service.client, jpeg())
        wait_until(lambda: len(service.batch_sizes()) == 1)
        leaving.close()
        wait_until(lambda: service.num_places_taken() == 0)
        staying = service.post(jpeg(seed=2))
        service.release()
        assert staying.result().json()["token_ids"] == expected_ids(jpeg(seed=2))


def test_a_picture_that_waits_too_long_gets_its_deadline_and_the_next_one_is_served():
    with held(WatchedTokenizer(), max_batch=1, request_deadline_s=0.6) as service:
        running = service.hold(jpeg())
        waiting = service.post(jpeg())
        for answer in (running, waiting):
            assert check_problem(answer.result(), 504, "deadline")["limit"] == 0.6
        assert service.num_places_taken() == 0
        service.release()
        wait_until(lambda: service.service.why_not_ready() is None)
        assert post(service.client, jpeg()).status_code == 200
        assert service.batch_sizes() == [1, 1]


def test_a_tokenizer_stuck_in_one_batch_is_not_ready_until_it_comes_back():
    with held(WatchedTokenizer(), request_deadline_s=0.5) as service:
        service.hold(jpeg()).result()
        wait_until(lambda: service.client.get("/readyz").status_code == 503)
        problem = check_problem(service.client.get("/readyz"), 503, "not-ready")
        assert "busy with one batch" in problem["detail"]
        check_problem(post(service.client, jpeg()), 503, "not-ready")
        service.release()
        wait_until(lambda: service.client.get("/readyz").status_code == 200)


def test_a_bad_batch_fails_only_the_guilty_and_the_next_one_is_served(caplog):
    with held(AllergicTokenizer(), max_batch=8) as service:
        bodies = [jpeg(seed=seed) for seed in range(3)]
        first = service.hold(bodies[0])
        guilty = service.post(RED, headers={"X-Request-Id": "the-red-one"})
        innocent = [service.post(body) for body in bodies]
        wait_until(lambda: service.num_waiting() == 4)
        service.release()
        assert first.result().status_code == 200
        for body, answer in zip(bodies, innocent, strict=True):
            assert answer.result().json()["token_ids"] == expected_ids(body)
        check_problem(guilty.result(), 500, "internal")
        assert service.batch_sizes() == [1, 4, 1, 1, 1, 1]
        assert post(service.client, bodies[0]).status_code == 200
        assert service.client.get("/readyz").status_code == 200
    assert "request the-red-one failed" in caplog.text
    assert "a secret" in caplog.text


def test_a_500_says_nothing_of_the_exception():
    with held(AllergicTokenizer()) as service:
        answer = post(service.client, RED)
        check_problem(answer, 500, "internal")
        assert "secret" not in answer.text
        assert "passwd" not in answer.text
        assert "RuntimeError" not in answer.text


def test_a_tokenizer_that_is_lost_for_good_is_not_ready_and_leaves_nobody_waiting():
    with held(MortalTokenizer(), max_batch=1) as service:
        running = service.hold(RED)
        waiting = service.post(jpeg())
        wait_until(lambda: service.num_waiting() == 1)
        service.release()
        check_problem(running.result(), 503, "not-ready")
        check_problem(waiting.result(), 503, "not-ready")
        check_problem(post(service.client, jpeg()), 503, "not-ready")
        problem = check_problem(service.client.get("/readyz"), 503, "not-ready")
        assert "has stopped" in problem["detail"]
        assert service.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("num_clients", [1, 16])
def test_under_load_every_client_gets_its_own_answer(num_clients):
    bodies = [jpeg(seed=seed) for seed in range(8)]
    expected = [expected_ids(body) for body in bodies]
    with held(WatchedTokenizer(), max_batch=4, max_queue=16) as service:
        answers = [service.post(bodies[i % 8]) for i in range(num_clients)]
        for i, answer in enumerate(answers):
            assert answer.result().json()["token_ids"] == expected[i % 8]


def test_a_client_may_wait_for_less_time_than_the_limit():
    with held(WatchedTokenizer(), max_batch=1) as service:
        running = service.hold(jpeg())
        impatient = service.post(jpeg(), headers={"X-Request-Timeout": "0.1"})
        assert check_problem(impatient.result(), 504, "deadline")["limit"] == 0.1
        service.release()
        assert running.result().status_code == 200


@pytest.mark.parametrize(("text", "seconds"), [(b"0.5", 0.5), (b"1e9", 2.0), (None, 2.0)])
def test_nobody_may_wait_for_longer_than_the_limit(text, seconds):
    headers = [] if text is None else [(b"x-request-timeout", text)]
    assert time_allowed(Request({"type": "http", "headers": headers}), 2.0) == seconds


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_time_to_wait_that_is_none_is_refused(client, seconds):
    answer = post(client, jpeg(), headers={"X-Request-Timeout": seconds})
    assert "positive number of seconds" in check_problem(answer, 400, "bad-request")["detail"]
