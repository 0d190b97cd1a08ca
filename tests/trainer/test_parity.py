"""Cached targets teach what a tokenizer in the loop teaches: the same losses, to the bit."""

import torch

from cache_builder.formats import TokenCache, draw_views
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers import PatchTokenizer
from tests import factories
from tests.trainer.caches import build_small, tiny_config
from trainer.data import BatchOrder, CachedViews, view_index
from trainer.distributed import Ranks
from trainer.step import Stepper

NUM_STEPS = 50


class TokenizerInTheLoop:
    """The usual way: draws the view, cuts it out and tokenises it, at every step."""

    def __init__(self, cache, codebook_path):
        self._cache = cache  # for its pictures and the rule of its views, not for token ids
        self._tokenizer = PatchTokenizer.load(codebook_path)

    def token_ids(self, picks):
        spec, pixels = self._cache.manifest.view_spec, []
        for pick in picks:
            sample = self._cache.read(pick.shard, pick.row, payloads={"image"})
            picture = decode(sample.image)
            views = draw_views(spec, sample.key, tuple(picture.shape[1:]))
            view = views[view_index(sample.key, pick.epoch, len(views))]
            pixels.append(apply_view(picture, view, spec.size, spec.interpolation))
        return self._tokenizer.encode(torch.stack(pixels)).flatten(1).long()


def test_fifty_steps_have_the_losses_of_a_tokenizer_in_the_loop(tmp_path):
    images = factories.photo_images(24)
    path = build_small(tmp_path, factories.colour_codebook(), images, scale=(0.3, 1.0))
    config = tiny_config(data={"color_jitter": 0.4}, run={"steps": NUM_STEPS})
    dataset = CachedViews(path, image_size=factories.SIZE)
    with TokenCache.open(path) as cache:
        order = BatchOrder([shard.num_samples for shard in cache.manifest.shards], 8, seed=0)
        in_the_loop = TokenizerInTheLoop(cache, tmp_path / "codebook.safetensors")
        ours, theirs = (
            Stepper(config, cache.manifest, cache.codebook, Ranks(), torch.device("cpu"))
            for _ in range(2)
        )
        losses = []
        for step in range(NUM_STEPS):
            picks = order.picks(step)
            batch = dataset.read(picks)
            tokenised = batch._replace(token_ids=in_the_loop.token_ids(picks))
            pair = [ours.take(step, batch)["loss"], theirs.take(step, tokenised)["loss"]]
            losses.append([float(loss) for loss in pair])
    dataset.close()
    assert all(cached == computed for cached, computed in losses)
    assert losses[-1][0] < losses[0][0]
