"""The settings of a cache with soft targets and features, and its samples."""

import numpy as np

from cache_builder.formats import TokenCache
from tests.cache_builder import builds

ARRAYS = ("token_ids", "soft_ids", "soft_probs", "features", "feature_scales")


def settings(tmp_path, **changes):
    payloads = {
        "num_views": 2,
        "soft_top_k": 4,
        "soft_temperature": 0.5,
        "store_features": "int8",
    }
    return builds.settings(tmp_path, **(payloads | changes))


def samples_of(cache_dir, **options):
    with TokenCache.open(cache_dir) as cache:
        shards = range(len(cache.manifest.shards))
        return [sample for shard in shards for sample in cache.read_shard(shard, **options)]


def assert_same(found, expected, names=ARRAYS):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.key, one.image, one.label) == (other.key, other.image, other.label)
        for name in names:
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
