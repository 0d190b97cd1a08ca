"""Damaged pictures: each is answered with ids or a reason, and the service is as it was before."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.mutants import mutants, originals
from tests.tokenizers_svc.support import expected_ids, post

NUM_FILES = 300


def test_the_undamaged_pictures_are_all_answered(client):
    for body in originals():
        assert post(client, body).json()["token_ids"] == expected_ids(body)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow thinks of the damage
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.slow
def test_damaged_pictures_get_ids_or_a_reason_and_never_a_failure(client):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: post(client, body), mutants(NUM_FILES)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 400, 413, 415, 422}, statuses
    assert statuses[200] > 10
    assert statuses[422] > 50
    for answer in answers:
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["detail"]
