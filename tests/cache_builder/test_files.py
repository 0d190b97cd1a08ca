"""A file is there whole, or not at all."""

import multiprocessing

import pytest

from cache_builder import files


def test_a_published_file_replaces_the_one_that_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        files.publish(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), files.publishing(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_no_name_before_it_is_complete(tmp_path):
    path = tmp_path / "file"
    with files.publishing(path) as file:
        file.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"


def test_a_new_file_never_replaces_another(tmp_path):
    path = tmp_path / "file"
    files.publish_new(path, b"first")
    with pytest.raises(FileExistsError):
        files.publish_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def _try_to_create(path, number, results):
    try:
        files.publish_new(path, b"%d" % number)
    except FileExistsError:
        return
    results.put(number)


def test_of_many_writers_of_a_new_file_one_wins(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    path = tmp_path / "file"
    writers = [context.Process(target=_try_to_create, args=(path, i, results)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    winner = results.get(timeout=10)
    assert results.empty()
    assert path.read_bytes() == b"%d" % winner


def test_leftovers_are_swept_and_results_are_not(tmp_path):
    keep = [tmp_path / "a.json", tmp_path / "b" / "c.tmp", tmp_path / ".hidden"]
    leftovers = [
        tmp_path / ".a.json.0.tmp",
        tmp_path / "b" / ".c.1.tmp",
        tmp_path / "b" / "x.partial",
    ]
    (tmp_path / "b").mkdir()
    for path in (*keep, *leftovers):
        path.touch()
    assert sorted(files.sweep(tmp_path)) == sorted(leftovers)
    assert all(path.exists() for path in keep)
    assert not any(path.exists() for path in leftovers)


def test_digests_are_those_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 10**6)
    assert files.sha256_file(tmp_path / "file") == files.sha256_bytes(b"abc" * 10**6)
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_bytes(b"abc") == expected


def test_equal_values_have_one_json_text():
    assert files.canonical_json({"b": [1, 2.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(float("nan"))
