"""Where the samples of one unit are written, whichever layout the cache has."""

from cache_builder.formats.plan import BuildPlan
from cache_builder.formats.shards import ShardWriter
from cache_builder.formats.zarr_store import RowWriter
from cache_builder.stores import Store


def open_writer(store: Store, plan: BuildPlan, unit: int) -> ShardWriter | RowWriter:
    """Return the writer of a unit of a cache or layer."""
    if plan.spec.layout == "webdataset":
        return ShardWriter(store, unit)
    return RowWriter(store, plan.spec, plan.num_units, unit)
