"""The service answers with the token ids of the library, from every device."""

import asyncio

import torch

from cache_builder.tokenizers import PatchTokenizer
from tests import factories
from tests.devices.test_codebooks import pixel_codebook
from tokenizers_svc.batcher import Batcher
from tokenizers_svc.pending import Crew


def test_pictures_in_batches_have_the_ids_of_each_alone(device):
    views = factories.photo_views(50, 16)
    expected = PatchTokenizer.load(pixel_codebook(), "cpu").encode(views).flatten(1).tolist()
    crew = Crew.for_device(torch.device(device), num_lanes=2, num_decoders=2)
    batcher = Batcher(
        lambda: PatchTokenizer.load(pixel_codebook(), device), max_batch=8, crew=crew
    )  # fmt: skip

    async def ask():
        batcher.start()
        while not batcher.is_ready:
            assert batcher.failure is None, batcher.failure
            await asyncio.sleep(0.01)
        answers = [await asyncio.gather(*map(batcher.encode, views)) for _ in range(3)]
        await batcher.close()
        return answers

    for answers in asyncio.run(ask()):
        assert [answer.ids.tolist() for answer in answers] == expected
