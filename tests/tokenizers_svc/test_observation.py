"""Those who look at the record of a request may fail; the request does not."""

from tests.tokenizers_svc.observed import ask, make_app


def test_an_observer_that_fails_hurts_nobody(caplog):
    def break_down(record):
        raise ValueError("full disk")

    seen = []
    answer = ask(make_app(break_down, seen.append), "POST", "/v1/models/one")
    assert answer.status_code == 200
    assert len(seen) == 1
    assert "an observer of requests failed" in caplog.text
