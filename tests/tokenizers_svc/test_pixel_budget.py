"""Pictures wait for room in the decoders, and a large one is decoded alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.tokenizers_svc.support import wait_until
from tokenizers_svc.pixel_budget import PixelBudget


class Decoders:
    """Threads that hold room until they are told to give it back."""

    def __init__(self, budget, pool):
        self.budget, self.pool, self.inside = budget, pool, []

    def decode(self, num_pixels):
        may_end = threading.Event()

        def hold():
            with self.budget.room_for(num_pixels):
                self.inside.append(num_pixels)
                assert may_end.wait(20)
                self.inside.remove(num_pixels)

        future = self.pool.submit(hold)

        def end():
            may_end.set()
            future.result(20)

        return end


@pytest.fixture
def decoders():
    with ThreadPoolExecutor(4) as pool:
        yield Decoders(PixelBudget(100), pool)


def test_pictures_wait_until_there_is_room(decoders):
    end_first = decoders.decode(60)
    wait_until(lambda: decoders.inside == [60])
    end_second = decoders.decode(40)
    wait_until(lambda: decoders.inside == [60, 40])
    end_third = decoders.decode(50)
    end_second()
    assert decoders.inside == [60]
    end_first()
    wait_until(lambda: decoders.inside == [50])
    end_third()


def test_a_picture_larger_than_all_the_room_is_decoded_alone(decoders):
    end_small = decoders.decode(1)
    wait_until(lambda: decoders.inside == [1])
    end_large = decoders.decode(500)
    end_small()
    wait_until(lambda: decoders.inside == [500])
    end_next = decoders.decode(1)
    end_large()
    wait_until(lambda: decoders.inside == [1])
    end_next()


def test_a_picture_that_cannot_be_decoded_gives_its_room_back(decoders):
    with pytest.raises(ZeroDivisionError), decoders.budget.room_for(100):
        raise ZeroDivisionError
    with decoders.budget.room_for(100):
        pass
