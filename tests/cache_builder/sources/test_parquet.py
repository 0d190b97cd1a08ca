"""Parquet image data sets, as Hugging Face stores them."""

import json
import logging

import pyarrow as pa
import pyarrow.compute
import pytest
from pyarrow import parquet

from cache_builder.errors import ConfigError, SourceError
from cache_builder.sources import ImageJoin, open_source
from cache_builder.stores import open_store
from tests import factories
from tests.listings import listed, read_all, rows_of


def write_dataset(path, num_rows, *, names=("cat", "dog"), row_group_size=None, **columns):
    """Write what `datasets` writes: images as structs, class names in the footer."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
    }
    table = pa.table(
        {
            "image": [{"bytes": b"image %d" % i, "path": f"{i}.jpg"} for i in range(num_rows)],
            "label": pa.array([i % 2 for i in range(num_rows)], pa.int64()),
            **columns,
        }
    )
    info = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def test_a_hugging_face_data_set_is_read_with_its_class_names_and_columns(tmp_path):
    path = write_dataset(
        tmp_path / "train-00000.parquet", 3, caption=["a", "b", None], score=[0.5, 1.5, 2.5],
    )  # fmt: skip
    listing = listed(path)
    assert listing.class_names == ("cat", "dog")
    assert listing.has_extra
    assert [(row.key, row.source, row.label, row.extra) for row in rows_of(listing)] == [
        ("train-00000/000000000", "0:0.jpg", 0, {"caption": "a", "score": 0.5}),
        ("train-00000/000000001", "1:1.jpg", 1, {"caption": "b", "score": 1.5}),
        ("train-00000/000000002", "2:2.jpg", 0, {"score": 2.5}),
    ]
    assert list(read_all(path).values()) == [b"image 0", b"image 1", b"image 2"]


def test_large_files_are_cut_at_row_groups(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / f"{name}.parquet", 10, row_group_size=3)
    listing = listed(tmp_path, unit_size=7)
    assert [len(unit.rows) for unit in listing.units] == [6, 4, 6, 4]
    assert [unit.rows[0].source for unit in listing.units] == ["0:0.jpg", "6:6.jpg"] * 2
    assert listing.unit_size == 64
    assert [len(unit.rows) for unit in listed(tmp_path).units] == [10, 10]
    assert [len(unit.rows) for unit in listed(tmp_path, unit_size=2).units] == [3, 3, 3, 1] * 2
    images = read_all(tmp_path, unit_size=7)
    assert list(images.values()) == [b"image %d" % i for i in range(10)] * 2


def test_some_rows_of_a_unit_are_read_alone(tmp_path):
    source = open_source(str(write_dataset(tmp_path / "t.parquet", 10, row_group_size=3)))
    (unit,) = source.scan(None).units
    some = unit.model_copy(update={"rows": unit.rows[4:8:3]})
    assert [image for _, image in source.read(some)] == [b"image 4", b"image 7"]


def test_binary_columns_and_names_as_labels_are_read(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"jpg": [b"1", b"2"], "label": ["owl", "ant"]}), path)
    listing = listed(path)
    assert [(row.source, row.label) for row in rows_of(listing)] == [("0", 1), ("1", 0)]
    assert listing.class_names == ("ant", "owl")
    assert list(read_all(path).values()) == [b"1", b"2"]


def test_labels_that_are_names_count_as_such_whatever_the_footer_says(tmp_path):
    path = write_dataset(tmp_path / "a.parquet", 2)
    table = parquet.read_table(path)
    texts = table.set_column(1, "label", pa.array(["owl", "ant"]))
    parquet.write_table(texts, path)
    listing = listed(path)
    assert [row.label for row in rows_of(listing)] == [1, 0]
    assert listing.class_names == ("ant", "owl")


def test_a_file_with_two_columns_of_labels_is_refused(tmp_path):
    columns = [pa.array([b"1"]), pa.array([0]), pa.array([1])]
    parquet.write_table(pa.table(columns, ["image", "label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"two columns named 'label'. Rename one"):
        listed(tmp_path / "a.parquet")


def test_a_footer_or_path_that_is_no_text_of_hugging_face_is_not_believed(tmp_path):
    table = pa.table({"image": [{"bytes": b"1", "path": 7}], "label": [1]})
    table = table.replace_schema_metadata({"huggingface": "[" * 100_000})
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = rows_of(listed(tmp_path / "a.parquet"))
    assert (row.source, row.label) == ("0", 1)


def test_a_file_without_labels_or_columns_is_read(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"picture": [b"1", b"2"]}), path)
    assert [row.label for row in rows_of(listed(path))] == [None, None]
    assert list(read_all(path).values()) == [b"1", b"2"]


def test_a_row_without_bytes_is_refused_and_the_others_are_read(tmp_path):
    path = tmp_path / "t.parquet"
    images = [{"bytes": b"1", "path": None}, {"bytes": None, "path": "2.jpg"}, None]
    parquet.write_table(pa.table({"image": images}), path)
    assert list(read_all(path).values()) == [b"1", *["the row holds no image bytes"] * 2]


def test_columns_that_are_no_scalars_are_left_out_and_named_once(tmp_path, caplog):
    for name in "ab":
        write_dataset(tmp_path / f"{name}.parquet", 2, boxes=[[1], [2]], when=[b"x", b"y"])
    with caplog.at_level(logging.WARNING):
        assert not listed(tmp_path).has_extra
    assert caplog.text.count("columns boxes, when hold neither text nor numbers") == 1


def test_files_of_two_data_sets_are_refused(tmp_path):
    write_dataset(tmp_path / "a.parquet", 2)
    write_dataset(tmp_path / "b.parquet", 2, names=("dog", "cat"))
    with pytest.raises(ConfigError, match=r"b.parquet has other columns or class names"):
        listed(tmp_path)


def test_what_is_no_image_data_set_is_refused_by_name(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match=r"t.parquet cannot be read as Parquet"):
        listed(path)
    parquet.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(SourceError, match=r"no column of images.*Its columns are x"):
        listed(path)
    write_dataset(path, 2, names=("cat",))
    with pytest.raises(SourceError, match=r"1:1.jpg has the label 1, and classes are numbered"):
        listed(path)


def test_a_text_that_is_not_utf8_is_told_with_the_name_of_its_file(tmp_path):
    texts = pa.array([b"caf\xc3\xa9", b"caf\xe9"], pa.binary())
    captions = pyarrow.compute.cast(texts, pa.string(), safe=False)
    path = write_dataset(tmp_path / "t.parquet", 2, caption=captions)
    with pytest.raises(SourceError, match=r"t.parquet cannot be read as Parquet: 'utf-8' codec"):
        listed(path)


def test_a_cache_without_images_is_joined_to_parquet_by_key(tmp_path, codebook_path):
    images = write_dataset(tmp_path / "images/t.parquet", 10, row_group_size=3)
    cache = tmp_path / "cache"
    plan = factories.plan_cache(images=str(images), codebook=codebook_path, out=cache)
    join = ImageJoin(open_store(cache), plan.spec.source)
    assert join.read(0, "t/000000007") == b"image 7"
    images.parent.rename(tmp_path / "moved")
    moved = ImageJoin(open_store(cache), plan.spec.source, str(tmp_path / "moved"))
    assert moved.read(0, "t/000000003") == b"image 3"
