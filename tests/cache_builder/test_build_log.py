"""The log beside a cache says how its builds went, and never stands in their way."""

import json
import logging
import socket
from datetime import UTC, datetime

import pytest

from cache_builder import build, build_log
from cache_builder.build_log import BuildRun, UnitWork, append, read, recording
from cache_builder.build_worker import UnitReport
from cache_builder.errors import SourceError
from cache_builder.ray_cluster import ClusterOptions
from tests import factories


def a_run(**changes):
    fields = {
        "started": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "outcome": "finished",
        "seconds": 9,
        "working_seconds": 2,
        "hosts": ("one",),
        "num_workers": 2,
        "devices": ("cpu",),
        "num_images": 10,
        "num_views": 40,
        "num_skipped": 1,
        "bytes_read": 1000,
        "bytes_written": 2000,
        "num_units": 3,
        "num_units_kept": 0,
        "images_per_s": 5,
        "versions": {"patchcache": "0"},
    }
    return BuildRun(**(fields | changes))


def a_report(num_samples, num_views, num_bytes, work):
    return UnitReport(
        0, num_samples, 0, num_views, num_bytes, was_there=work is None, summaries=(), work=work
    )


@pytest.mark.ray
def test_a_run_of_build_adds_a_line_beside_the_cache(tmp_path, codebook_path, ray_cluster):
    images = factories.write_folder(
        tmp_path / "images", factories.patch_images(5) | {"a/bad.png": b"none"}
    )
    settings = {
        "images": str(images), "codebook": codebook_path, "out": tmp_path / "cache",
        "num_views": 2, "unit_size": 2, "device": "cpu",
    }  # fmt: skip
    plan = factories.plan_cache(**settings)
    kept = factories.make_worker(settings["out"], plan).run(0)
    build.run(build.BuildOptions(**settings, cluster=ClusterOptions(num_workers=1)))
    (run,) = read(str(tmp_path / "cache"))
    assert (run.outcome, run.num_units, run.num_units_kept) == ("finished", 2, 1)
    assert run.num_images == 5 - kept.num_samples
    assert run.num_views == 2 * run.num_images
    assert run.num_skipped == 1 - kept.num_skipped
    sizes = {p.relative_to(images).as_posix(): p.stat().st_size for p in images.rglob("*.png")}
    first_unit = sorted(sizes)[:2]
    assert run.bytes_read == sum(sizes[name] for name in sizes if name not in first_unit)
    shards = [tmp_path / "cache/shards" / f"00000{unit}.tar" for unit in (1, 2)]
    assert run.bytes_written == sum(path.stat().st_size for path in shards)
    assert (run.devices, run.hosts) == (("cpu",), (socket.gethostname(),))
    assert run.images_per_s == pytest.approx(run.num_images / run.working_seconds, rel=0.05)
    assert 0 < run.working_seconds <= run.seconds
    assert {"patchcache", "torch", "ray"} <= run.versions.keys()
    assert (tmp_path / "cache.log.jsonl").is_file()


@pytest.mark.parametrize(
    ("raised", "outcome", "error"),
    [
        (SourceError("photo.jpg cannot be read.\nmore"), "failed",
         "SourceError: photo.jpg cannot be read.\\nmore"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)  # fmt: skip
def test_a_run_that_does_not_finish_is_logged_and_still_raises(tmp_path, raised, outcome, error):
    cache = str(tmp_path / "cache")
    work = UnitWork("host", 1, "cpu", seconds=0.5, bytes_read=7)
    unit = a_report(3, 12, 99, work)
    with pytest.raises(type(raised)), recording(cache) as log:
        log.unit_done(unit)
        raise raised
    (run,) = read(cache)
    assert (run.outcome, run.error) == (outcome, error)
    assert (run.num_images, run.num_views, run.bytes_read, run.bytes_written) == (3, 12, 7, 99)


def test_rates_are_over_the_time_in_which_units_are_at_work(tmp_path, monkeypatch):
    clock = iter([0.0, 12.0, 14.0, 20.0])
    monkeypatch.setattr(build_log.time, "monotonic", lambda: next(clock))
    recorder = build_log.Recorder()
    for process, seconds in ((1, 2.0), (2, 3.5)):  # from 10 to 12, and from 10.5 to 14
        work = UnitWork("host", process, "cpu", seconds, 0)
        recorder.unit_done(a_report(20, 40, 0, work))
    run = recorder.run("finished")
    assert (run.seconds, run.working_seconds) == (20, 4)
    assert (run.images_per_s, run.views_per_s, run.num_workers) == (10, 20, 2)


def test_a_run_that_only_confirms_a_cache_has_no_rate(tmp_path):
    with recording(str(tmp_path / "cache")) as log:
        log.unit_done(a_report(20, 0, 0, None))
    (run,) = read(str(tmp_path / "cache"))
    assert (run.num_images, run.num_units_kept, run.images_per_s) == (0, 1, 0)


@pytest.mark.parametrize("torn", [b'{"started": "2026', b'{"started": "2026\n', b"\xff\xfe\n"])
def test_a_damaged_last_line_is_passed_over_and_swallows_no_later_one(tmp_path, torn):
    cache = str(tmp_path / "cache")
    append(cache, a_run())
    with (tmp_path / "cache.log.jsonl").open("ab") as file:
        file.write(torn)
    assert read(cache) == [a_run()]
    append(cache, a_run(num_images=11))
    assert [run.num_images for run in read(cache)] == [10, 11]


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    line = json.loads(a_run().model_dump_json()) | {"energy_joules": 7}
    (tmp_path / "cache.log.jsonl").write_text(json.dumps(line) + "\n")
    assert read(str(tmp_path / "cache")) == [a_run()]


def test_a_trailing_slash_names_the_same_log(tmp_path):
    append(f"{tmp_path}/cache/", a_run())
    assert read(f"{tmp_path}/cache") == [a_run()]
    assert [path.name for path in tmp_path.iterdir()] == ["cache.log.jsonl"]


def test_a_cache_by_another_name_has_the_same_log(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    append(f"{tmp_path}/cache", a_run())
    monkeypatch.chdir(tmp_path / "cache")
    assert read(".") == read("../alias") == read("../cache/") == [a_run()]


def test_a_cache_that_is_the_whole_of_a_bucket_leaves_no_log_and_no_folder(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    append("s3://bucket", a_run())
    assert "The log of this build is not kept: s3://bucket.log.jsonl" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_run_adds_to_a_unit_is_logged(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(3))
    other = factories.write_codebook(tmp_path / "b.safetensors", colours=factories.COLOURS[::-1])
    settings = {
        "images": str(images), "codebook": codebook_path, "out": tmp_path / "cache",
        "further_codebooks": (other,), "num_views": 2, "device": "cpu",
        "cluster": ClusterOptions(num_workers=0),
    }  # fmt: skip
    build.run(build.BuildOptions(**settings))
    (record,) = (tmp_path / "cache" / "targets").glob("*/units/000000.json")
    record.unlink()
    build.run(build.BuildOptions(**settings))
    whole, again = read(str(tmp_path / "cache"))
    (layer,) = (tmp_path / "cache" / "targets").glob("*/shards/000000.tar")
    assert (whole.num_views, again.num_views) == (12, 6)
    assert again.bytes_written == layer.stat().st_size
    assert whole.bytes_written > again.bytes_written


def test_a_place_where_nothing_can_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "cache.log.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        append(str(tmp_path / "cache"), a_run())
        append("gopher://bucket/cache", a_run())
    assert [record.message[:33] for record in caplog.records] == [
        "The log of this build is not kept"
    ] * 2
    assert read(str(tmp_path / "cache")) == []
    assert read("gopher://bucket/cache") == []


def test_a_log_on_an_object_store_grows_as_well(bucket):
    assert read(f"{bucket}/runs/cache") == []
    for number in (1, 2):
        append(f"{bucket}/runs/cache", a_run(num_images=number))
    assert [run.num_images for run in read(f"{bucket}/runs/cache/")] == [1, 2]
