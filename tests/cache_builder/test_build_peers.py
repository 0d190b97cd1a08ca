"""The script that the benchmark of `build` stands beside does the same work."""

import numpy as np

from cache_builder.formats import TokenCache
from tests import factories
from tests.benchmarks import build_peers


def test_a_script_of_one_file_per_image_writes_the_token_ids_of_a_build(tmp_path, codebook_path):
    photos = {f"{i:02d}.jpg": factories.encode(factories.draw_photo(i), "JPEG") for i in range(5)}
    images = factories.write_folder(tmp_path / "images", photos)
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=tmp_path / "cache", num_views=3
    )
    for _ in range(2):  # the second finds everything there
        build_peers.save_rank(0, 1, images, codebook_path, tmp_path / "files", 3, "cpu")
    with TokenCache.open(tmp_path / "cache") as cache:
        for row in range(len(cache)):
            sample = cache[row]
            ids = np.load(tmp_path / "files" / "tokens" / f"{sample.key}.npy")
            boxes = np.load(tmp_path / "files" / "crop_settings" / f"{sample.key}.npy")
            assert np.array_equal(ids, sample.token_ids)
            assert np.array_equal(boxes, sample.views)
    assert len(list((tmp_path / "files" / "tokens").iterdir())) == len(photos)
