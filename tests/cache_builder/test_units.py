"""A unit is built in batches, and what a batch is depends on nothing but its images."""

import pytest

from cache_builder.formats.manifest import UnitRecord
from tests import factories

NUM_IMAGES = 40  # two batches and a half


def build_unit(folder, images, codebook, decode_threads):
    """Build a cache of one unit; return its files, and its record."""
    source = factories.write_folder(folder / "images", images)
    plan = factories.plan_cache(
        images=str(source), codebook=codebook, out=folder / "cache", num_views=2, soft_top_k=3
    )
    assert plan.num_units == 1
    factories.make_worker(folder / "cache", plan, decode_threads=decode_threads).run(0)
    record = factories.read(UnitRecord, folder / "cache", "units/000000.json")
    return factories.contents(folder / "cache" / "shards"), record


@pytest.mark.parametrize("decode_threads", [1, 3])
@pytest.mark.parametrize("bad", [(0,), (15, 16), (3, 4, 20, 39), tuple(range(16, 32))])
def test_images_that_are_left_out_change_nothing_for_the_others(tmp_path, bad, decode_threads):
    codebook = factories.write_codebook(tmp_path / "codebook.safetensors", objective=(1e6,))
    images = factories.photo_images(NUM_IMAGES)
    names = sorted(images)
    broken = images | {names[number]: images[names[number]][:200] for number in bad}
    good = {name: data for name, data in images.items() if broken[name] == data}
    shards, record = build_unit(tmp_path / "broken", broken, codebook, decode_threads)
    expected, undisturbed = build_unit(tmp_path / "good", good, codebook, 1)
    assert [sample.source for sample in record.skipped] == [names[number] for number in bad]
    assert shards == expected
    # What soft targets are worth is sampled from every batch, so it shows which images were one.
    assert record.soft == undisturbed.soft
    assert record.model_copy(update={"skipped": ()}) == undisturbed
