"""Sources on object stores and web servers give what they give on a disk."""

import io
import subprocess
import sys
import tarfile
import zipfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from cache_builder.errors import ConfigError, MissingDependencyError, SourceError
from cache_builder.sources import ImageJoin, open_source, remote
from cache_builder.stores import open_store
from tests import factories
from tests.listings import folder, listed, read_all, rows_of


def tar_bytes(content, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def parquet_bytes(images):
    buffer = io.BytesIO()
    structs = [{"bytes": image, "path": None} for image in images]
    parquet.write_table(pa.table({"image": structs}), buffer, row_group_size=2)
    return buffer.getvalue()


CONTENT = {f"{i}.jpg": b"%d" % i * 3000 for i in range(6)}
FILES = {
    "t.tar": tar_bytes(CONTENT),
    "t.tar.gz": tar_bytes(CONTENT, "w:gz"),
    "t.zip": zip_bytes(CONTENT),
    "t.parquet": parquet_bytes(CONTENT.values()),
}


def test_a_folder_on_s3_is_listed_and_read_as_one_on_a_disk(tmp_path, bucket):
    names = ("dog/2.jpg", "cat/b.PNG", "cat/deep/a.jpg", "dog/.x.jpg", ".git/1.jpg", "dog/n.txt")
    folder(tmp_path, *names)
    for name in names:
        bucket.put(f"set/{name}", name.encode())
    here, there = listed(tmp_path), listed(f"{bucket.url}/set")
    assert there.units == here.units
    assert there.class_names == here.class_names
    assert there.info.location == f"{bucket.url}/set"
    assert read_all(f"{bucket.url}/set/") == read_all(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_containers_on_s3_are_listed_and_read_as_on_a_disk(tmp_path, bucket, name):
    (tmp_path / name).write_bytes(FILES[name])
    bucket.put(f"{name}.d/{name}", FILES[name])
    expected = list(CONTENT.values())
    assert list(read_all(tmp_path / name).values()) == expected
    for place in (f"{bucket.url}/{name}.d/{name}", f"{bucket.url}/{name}.d"):
        assert list(read_all(place).values()) == expected
        assert rows_of(listed(place)) == rows_of(listed(tmp_path / name))


def test_a_list_on_s3_names_what_lies_beside_it_and_on_the_web(bucket, serve):
    web = serve({"x/far.jpg": b"far"})
    bucket.put("set/near.jpg", b"near")
    bucket.put("set/t.txt", f"near.jpg\tcat\n{web.url}/x/far.jpg?size=1\tdog\n".encode())
    listing = listed(f"{bucket.url}/set/t.txt")
    assert sorted(row.source for row in rows_of(listing)) == sorted(
        ["near.jpg", f"{web.url}/x/far.jpg?size=1"]
    )
    assert listing.class_names == ("cat", "dog")
    assert sorted(read_all(f"{bucket.url}/set/t.txt").values()) == [b"far", b"near"]


@pytest.mark.parametrize("line", ["/etc/passwd", "../../x.jpg", "file:///etc/passwd", "a::b://c"])
def test_a_list_from_a_server_may_not_name_files_of_this_machine(serve, line):
    web = serve({"t.txt": line.encode()})
    with pytest.raises(SourceError, match=r"line 1 names .*no file of this machine"):
        listed(f"{web.url}/t.txt")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "moods", [{}, {"has_ranges": False}, {"num_busy": 3}, {"num_broken": 3},
              {"has_ranges": False, "num_broken": 2}],
)  # fmt: skip
def test_containers_on_the_web_are_read_through_busy_servers_and_broken_lines(serve, name, moods):
    web = serve(FILES, **moods)
    assert list(read_all(f"{web.url}/{name}").values()) == list(CONTENT.values())
    assert not web.num_busy
    assert not web.num_broken


def test_images_on_the_web_are_read_a_few_at_once_and_come_in_order(serve, tmp_path):
    web = serve(CONTENT, num_busy=2, num_broken=2)
    urls = [f"{web.url}/{name}" for name in CONTENT]
    (tmp_path / "t.txt").write_text("\n".join(urls))
    assert list(read_all(tmp_path / "t.txt").values()) == list(CONTENT.values())


def test_an_address_that_is_dead_is_recorded_and_asked_once(serve, tmp_path):
    web = serve(CONTENT)
    lines = [f"{web.url}/0.jpg", f"{web.url}/gone.jpg", f"{web.url}/forbidden.jpg"]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    images = list(read_all(tmp_path / "t.txt").values())
    assert images[0] == CONTENT["0.jpg"]
    assert "forbidden.jpg cannot be read" in images[1]
    assert "Check the credentials in the environment" in images[1]
    assert "gone.jpg cannot be read: it is not there (404)" in images[2]
    assert [path for path, _ in web.requests].count("gone.jpg") == 1
    assert [path for path, _ in web.requests].count("forbidden.jpg") == 1


def test_a_server_that_stays_busy_is_an_error_that_says_so(serve):
    web = serve(FILES, num_busy=10**6)
    with pytest.raises(SourceError, match=r"t.tar cannot be found: .*503.*6 times in a row. Run"):
        listed(f"{web.url}/t.tar")
    assert len(web.requests) == 6


def test_a_file_that_is_not_there_is_asked_for_once(serve, bucket):
    web = serve({})
    with pytest.raises(SourceError, match=r"x.tar cannot be found: it is not there \(404\)"):
        listed(f"{web.url}/x.tar")
    assert len(web.requests) == 1
    with pytest.raises(SourceError, match=r"forbidden.tar cannot be found.*credentials"):
        listed(f"{web.url}/forbidden.tar")
    for place in ("x.tar", "nothing", "x.parquet"):
        with pytest.raises(SourceError, match=r"it is not there \(404\). Check the name"):
            listed(f"{bucket.url}/{place}")


def test_a_web_server_has_no_folders(serve):
    with pytest.raises(ConfigError, match=r"does not list its folders\. Name files"):
        listed(serve({}).url)


def test_a_tar_that_has_changed_since_it_was_listed_is_an_error(bucket):
    bucket.put("t.tar", FILES["t.tar"])
    source = open_source(f"{bucket.url}/t.tar")
    (unit,) = source.scan(None).units
    bucket.put("t.tar", FILES["t.tar"] * 2)
    with pytest.raises(SourceError, match=r"had 30,720 when it was listed: it has changed since"):
        list(source.read(unit))


def test_a_few_rows_of_a_large_tar_are_read_by_ranges(serve):
    web = serve(FILES)
    source = open_source(f"{web.url}/t.tar")
    (unit,) = source.scan(None).units
    web.requests.clear()
    some = unit.model_copy(update={"rows": unit.rows[2:4]})
    assert [image for _, image in source.read(some)] == [b"2" * 3000, b"3" * 3000]
    # One byte to learn the size, and each member with its header.
    assert sorted(wanted for _, wanted in web.requests) == sorted(
        ["bytes=0-0", *(f"bytes={at}-{at + 3511}" for at in (2 * 3584, 3 * 3584))]
    )


@pytest.mark.parametrize("name", [*FILES, "folder"])
def test_a_cache_without_images_is_joined_to_them_on_s3_by_key(
    tmp_path, codebook_path, bucket, name
):
    for file, data in CONTENT.items():
        bucket.put(f"folder/{file}", data)
    place = f"{bucket.url}/{name}"
    if name in FILES:
        bucket.put(name, FILES[name])
    cache = tmp_path / "cache"
    plan = factories.plan_cache(images=place, codebook=codebook_path, out=cache)
    join = ImageJoin(open_store(cache), plan.spec.source)
    keys = {row.key: image for row, image in zip(
        rows_of(listed(place)), CONTENT.values(), strict=True)}  # fmt: skip
    for key in (*keys, *reversed(keys)):
        assert join.read(0, key) == keys[key]


def test_a_build_from_s3_has_the_targets_of_one_from_a_disk(tmp_path, codebook_path, bucket):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(4))
    for name, data in factories.patch_images(4).items():
        bucket.put(f"set/{name}", data)
    for out, place in (("here", str(images)), ("there", f"{bucket.url}/set")):
        factories.build_cache(images=place, codebook=codebook_path, out=tmp_path / out)
    shard = "shards/000000.tar"
    assert (tmp_path / "there" / shard).read_bytes() == (tmp_path / "here" / shard).read_bytes()


def test_a_scheme_whose_library_is_missing_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from cache_builder.sources import open_source\n"
        "open_source('s3://bucket/t.tar').scan(None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert MissingDependencyError.__name__ in done.stderr
    assert "s3://bucket needs a library that is not installed" in done.stderr
    assert "pip install 'patchcache[remote]'" in done.stderr


def test_a_scheme_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="Protocol not known: nowhere"):
        listed("nowhere://bucket/t.tar")


def test_local_sources_do_not_import_what_remote_ones_need(tmp_path):
    folder(tmp_path, "a.jpg")
    code = (
        f"from cache_builder.sources import open_source; open_source({str(tmp_path)!r}).scan(None)"
        "; import sys; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fsspec", "s3fs", "aiohttp", "pyarrow"} & set(done.stdout.split())


def test_tries_are_paused_longer_and_longer(serve, monkeypatch):
    pauses = []
    web = serve(FILES, num_busy=4)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    remote.describe(f"{web.url}/t.tar")
    assert len(pauses) == 4
    assert all(0.75 * 2**i <= 1000 * pause <= 1.25 * 2**i for i, pause in enumerate(pauses))
