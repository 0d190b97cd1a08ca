"""Labels, class names and further columns travel from the source into the cache."""

import json
import tarfile

import pytest
import zarr

from cache_builder.formats import TokenCache
from cache_builder.formats.manifest import UnitRecord, unit_record_name
from cache_builder.formats.sample import NewSample
from cache_builder.formats.shards import ShardWriter, read_shard
from cache_builder.stores import open_store
from cache_builder.verify import run as verify
from tests import factories

IMAGES = list(factories.patch_images(3).values())


@pytest.fixture
def tar(tmp_path):
    return factories.write_tar(
        tmp_path / "t.tar",
        [
            ("0.png", IMAGES[0]), ("0.json", b'{"label": 1, "url": "u", "n": [1, {"a": null}]}'),
            ("1.png", IMAGES[1]), ("1.cls", b"0"), ("1.txt", "a \u00e9 caption".encode()),
            ("1.json", b'{"label": 7, "txt": "of the JSON"}'),
            ("2.png", IMAGES[2]),
        ],
    )  # fmt: skip


EXTRA = [{"url": "u", "n": [1, {"a": None}]}, {"txt": "of the JSON"}, {}]


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_further_columns_are_read_back_from_the_cache(tmp_path, codebook_path, tar, layout):
    out = tmp_path / "cache"
    manifest = factories.build_cache(
        images=str(tar), codebook=codebook_path, out=out, layout=layout
    )
    assert manifest.spec.has_extra
    with TokenCache.open(out) as cache:
        assert [sample.extra for sample in cache] == EXTRA
        assert [sample.label for sample in cache] == [1, 0, None]
        json.dumps(cache[0].extra)


def test_plain_tools_find_the_columns(tmp_path, codebook_path, tar):
    for layout in ("webdataset", "zarr"):
        factories.build_cache(
            images=str(tar), codebook=codebook_path, out=tmp_path / layout, layout=layout
        )
    with tarfile.open(tmp_path / "webdataset/shards/000000.tar") as shard:
        infos = [json.load(shard.extractfile(f"{i}.json")) for i in range(3)]
    assert [info.get("extra") for info in infos] == [EXTRA[0], EXTRA[1], None]
    group = zarr.open_group(tmp_path / "zarr/tokens.zarr", mode="r")
    texts = group["extra"][:3].tolist()
    assert [json.loads(text or "{}") for text in texts] == EXTRA
    samples = read_shard(tmp_path / "webdataset/shards/000000.tar")
    assert [sample.extra for sample in samples] == EXTRA


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_a_cache_of_a_source_without_further_columns_does_not_name_them(
    tmp_path, codebook_path, layout
):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(2))
    out = tmp_path / "cache"
    factories.build_cache(images=str(images), codebook=codebook_path, out=out, layout=layout)
    for name, content in factories.contents(out).items():
        assert b'extra"' not in content, name
        assert not name.startswith("tokens.zarr/extra"), name
        assert b"refused" not in content, name
    with TokenCache.open(out) as cache:
        assert [dict(sample.extra) for sample in cache] == [{}, {}]


@pytest.mark.parametrize(
    ("unit", "column", "there", "planned"),
    [
        (0, "url", '"other"', '"u"'),
        (0, "n", '[true,{"a":null}]', '[1,{"a":null}]'),
        (1, "txt", "none", '"of the JSON"'),
        (2, "added", '"new"', "none"),
    ],
)
def test_a_column_that_was_changed_with_its_digests_is_found_and_made_again(
    tmp_path, codebook_path, unit, column, there, planned
):
    members = [
        ("0.png", IMAGES[0]), ("0.json", b'{"label": 1, "url": "u", "n": [1, {"a": null}]}'),
        ("1.png", IMAGES[1]), ("1.json", b'{"txt": "of the JSON"}'), ("2.png", IMAGES[2]),
    ]  # fmt: skip
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(3):
        some = [(name, data) for name, data in members if name[0] == str(number)]
        factories.write_tar(tars / f"{number}.tar", some)
    out = tmp_path / "cache"
    factories.build_cache(images=str(tars), codebook=codebook_path, out=out)
    before = factories.contents(out)
    with TokenCache.open(out) as cache:
        (sample,) = cache.read_shard(unit)
        info = cache.shard(unit).info(0)
    extra = {name: value for name, value in sample.extra.items() if name != column}
    extra |= {} if there == "none" else {column: json.loads(there)}
    new = NewSample(sample._replace(extra=extra), "png", info.source, info.image_size)
    with ShardWriter(open_store(out), unit) as writer:
        writer.add(new)
        written = writer.finish()
    record = factories.read(UnitRecord, out, unit_record_name(unit))
    changes = {"files": written.files, "samples": written.samples}
    factories.rewrite_record(out, unit, record.model_copy(update=changes))
    (damage,) = verify(out, device="cpu").damages
    assert (damage.kind, damage.unit) == ("content", unit)
    assert damage.detail == f"{unit}: column '{column}' is {there}, planned {planned}"
    report = verify(out, device="cpu", repair=True)
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(out) == before
