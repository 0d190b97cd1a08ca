"""The door: what it counts, what it refuses, and that everything is given back."""

import pytest

from tokenizers_svc.admission import Door
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError


def make_door(seconds_per_picture=0.0, **limits):
    resolved = Limits(**limits).resolved(on_cpu=True, num_cores=2)
    return Door(resolved, lambda: seconds_per_picture)


def refusal(action):
    with pytest.raises(ProblemError) as caught:
        action()
    assert caught.value.status == 429
    return caught.value


def test_places_are_given_back_at_the_end_whatever_happened():
    door = make_door(max_queue=2)
    with door.admit(num_bytes=10) as place:
        place.hold_bytes(500)
        assert (door.num_pictures, door.num_bytes) == (1, 500)
    with pytest.raises(ZeroDivisionError), door.admit():
        raise ZeroDivisionError
    assert (door.num_pictures, door.num_bytes) == (0, 0)


def test_every_picture_of_a_request_takes_a_place():
    door = make_door(max_queue=5)
    with door.admit() as place, door.admit():
        place.hold_pictures(4)
        error = refusal(door.admit)
        assert (error.limit, error.actual) == (5, 6)
        assert "takes 5 at once" in error.detail
        refusal(lambda: place.hold_pictures(5))
        assert door.num_pictures == 5
    assert door.num_pictures == 0


def test_bodies_are_bounded_together_by_what_they_announce():
    door = make_door(max_held_bytes=1000, max_body_bytes=600, max_batch_body_bytes=900)
    with door.admit(num_bytes=600) as first:
        error = refusal(lambda: door.admit(num_bytes=401))
        assert (error.limit, error.actual) == (1000, 1001)
        assert door.num_pictures == 1
        with door.admit() as growing:
            growing.hold_bytes(400)
            refusal(lambda: growing.hold_bytes(401))
            first.hold_bytes(0)
            growing.hold_bytes(401)
    assert door.num_bytes == 0


def test_what_would_wait_too_long_is_refused_with_the_time_to_come_back():
    door = make_door(seconds_per_picture=0.6, max_queue_wait_s=1.0, max_queue=100)
    with door.admit(), door.admit():
        error = refusal(door.admit)
        assert (error.limit, error.actual) == (1.0, 1.2)
        assert error.headers == {"Retry-After": "2"}
        assert "1.2 s" in error.detail
    door.admit()


def test_an_empty_service_takes_a_picture_however_slow_it_is():
    with make_door(seconds_per_picture=100.0).admit():
        pass


def test_come_back_is_at_least_one_second_and_at_most_sixty():
    door = make_door(max_queue=1)
    with door.admit():
        assert refusal(door.admit).headers == {"Retry-After": "1"}
    slow = make_door(seconds_per_picture=1e6)
    with slow.admit():
        assert refusal(slow.admit).headers == {"Retry-After": "60"}


def test_limits_that_could_never_be_met_are_mended():
    limits = Limits(max_queue=3, max_held_bytes=1).resolved(on_cpu=True, num_cores=2)
    assert limits.max_items == 3
    assert limits.max_held_bytes == limits.max_batch_body_bytes
    assert Limits().resolved(on_cpu=True, num_cores=2).max_queue == 64
    assert Limits().resolved(on_cpu=False, num_cores=2).max_queue == 128
