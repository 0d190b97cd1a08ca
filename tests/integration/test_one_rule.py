"""One view has one row of tokens: from the library, either cache layout and the service."""

import numpy as np
import pytest
import torch

from cache_builder.formats import TokenCache, View
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers import PatchTokenizer
from tests import factories
from tests.tokenizers_svc.support import post, serving
from tokenizers_svc.app import create_app


@pytest.mark.parametrize("images_in_cache", ["original", "resized"])
def test_library_caches_and_service_agree_on_every_view(tmp_path, codebook_path, images_in_cache):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(4))
    samples = {}
    for layout in ("webdataset", "zarr"):
        out = tmp_path / layout
        factories.build_cache(
            images=str(images), codebook=codebook_path, out=out, layout=layout, num_views=4,
            images_in_cache=images_in_cache, resized_short_side=30,
        )  # fmt: skip
        with TokenCache.open(out) as cache:
            samples[layout] = list(cache)
            fingerprint = cache.manifest.fingerprint
    tokenizer = PatchTokenizer.load(codebook_path)
    rule = tokenizer.pixel_rule
    num_views = 0
    with serving(create_app(codebook_path, device="cpu")) as client:
        for tar, zarr in zip(samples["webdataset"], samples["zarr"], strict=True):
            picture = decode(tar.image)
            for index, (top, left, height, width, hflip) in enumerate(tar.views.tolist()):
                view = View(top, left, height, width, bool(hflip))
                pixels = apply_view(picture, view, rule.size, rule.interpolation)
                library = tokenizer.encode(pixels[None])[0].numpy()
                text = f"{top},{left},{height},{width}" + (",1" if hflip else "")
                answer = post(client, tar.image, params={"view": text}).json()
                assert answer["fingerprint"] == fingerprint
                np.testing.assert_array_equal(np.reshape(answer["token_ids"], rule.grid), library)
                np.testing.assert_array_equal(tar.token_ids[index], library)
                np.testing.assert_array_equal(zarr.token_ids[index], library)
                num_views += 1
    assert num_views == 16
    assert len({s.token_ids.tobytes() for s in samples["zarr"]}) == 4
    assert torch.get_num_threads() == 1
