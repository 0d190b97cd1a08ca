"""`patchcache tokenize`: images of any source to a file of ids, by a service over a socket."""

import io
import json
import tarfile

import numpy as np
import pytest

from tests.tokenizers_svc import moody
from tests.tokenizers_svc.moody import MoodyServer
from tests.tokenizers_svc.support import GRID, expected_ids, jpeg
from tokenizers_svc.client import files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures of two classes and a file that is none."""
    root = tmp_path_factory.mktemp("images") / "photos"
    for name, body in {
        "a/0.jpg": jpeg(seed=0),
        "a/1.jpg": jpeg(seed=1),
        "b/2.jpg": jpeg(seed=2),
        "b/bad.jpg": b"text",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


@pytest.fixture
def tokenize(client, patchcache):
    """Run the command against the service of the module."""

    def run(*words, url=client.base_url):
        return patchcache("tokenize", *words, "--url", url)

    return run


def lines_of(text):
    return {fields["image"]: fields for fields in map(json.loads, text.splitlines())}


def test_a_folder_becomes_lines_on_stdout_and_the_failures_are_listed(folder, tokenize):
    outcome = tokenize(folder)
    assert outcome.status == 1
    found = lines_of(outcome.out)
    assert list(found) == [f"{folder}/{name}" for name in ("a/0.jpg", "a/1.jpg", "b/2.jpg")]
    for i, fields in enumerate(found.values()):
        assert fields["shape"] == GRID
        assert fields["token_ids"] == expected_ids(jpeg(seed=i))
        assert len(fields["fingerprint"]) == 64
        assert fields["model"] == "tiny-k16"
    assert outcome.err.startswith(f"failed       {folder}/b/bad.jpg: The picture is refused")


def test_files_and_folders_and_archives_are_one_list(folder, tokenize, tmp_path):
    tar = tmp_path / "shard.tar"
    with tarfile.open(tar, "w") as archive:
        member = tarfile.TarInfo("x.jpg")
        member.size = len(jpeg(seed=5))
        archive.addfile(member, io.BytesIO(jpeg(seed=5)))
    out = tmp_path / "new" / "tokens.npy"
    photo = folder / "a" / "1.jpg"
    missing = tokenize(photo, folder / "c.jpg", "--out", out)
    assert (
        missing.err == f"failed       {folder}/c.jpg: cannot be read: No such file or directory\n"
    )
    outcome = tokenize(photo, tar, folder / "a", photo, "--out", out)
    assert outcome.status == 0, outcome.err
    assert "tokenised    2 images\nkept         1 of" in outcome.out
    assert f"numpy.load('{out}')" in outcome.out
    ids = np.load(out)
    assert ids.dtype == np.uint16
    assert [row.ravel().tolist() for row in ids] == [expected_ids(jpeg(seed=i)) for i in (1, 5, 0)]
    assert list(out.parent.iterdir()) == [out]


def test_an_image_without_tokens_is_absent_in_the_array_and_asked_for_again(
    folder, tokenize, tmp_path
):
    out = tmp_path / "tokens.npz"
    bad = folder / "b" / "bad.jpg"
    outcome = tokenize(folder, "--out", out)
    assert outcome.status == 1
    assert "failed       1; run the same command to try again" in outcome.out
    with np.load(out) as found:
        assert found["images"].tolist()[-1] == str(bad)
        assert (found["token_ids"][-1] == files.ABSENT).all()
        assert (found["token_ids"][:-1] < 16).all()
        assert len(str(found["fingerprint"])) == 64
    try:
        bad.write_bytes(jpeg(seed=7))
        outcome = tokenize(folder, "--out", out)
    finally:
        bad.write_bytes(b"text")
    assert outcome.status == 0
    assert "tokenised    1 images\nkept         3 of an earlier run" in outcome.out
    with np.load(out) as found:
        assert found["token_ids"][-1].ravel().tolist() == expected_ids(jpeg(seed=7))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]


def test_lines_are_continued_where_a_run_was_killed(folder, tokenize, tmp_path):
    out = tmp_path / "tokens.jsonl"
    tokenize(folder, "--out", out)
    whole = out.read_text()
    assert len(whole.splitlines()) == 3
    out.write_text(whole[: len(whole) // 2])
    outcome = tokenize(folder, "--out", out)
    assert "tokenised    2 images\nkept         1 of an earlier run" in outcome.out
    assert out.read_text() == whole


def test_nothing_is_asked_for_twice(folder, tmp_path, patchcache):
    def answer(request):
        return moody.ok(moody.tokens()) if request[0] == "POST" else moody.ok({"status": "ready"})

    words = ["tokenize", folder / "a", "--out", tmp_path / "tokens.jsonl", "--url"]
    with MoodyServer(answer, models=moody.models(max_items=1)) as server:
        assert patchcache(*words, server.url).status == 0
        assert sum(request[0] == "POST" for request in server.requests) == 2
        assert patchcache(*words, server.url).status == 0
        assert sum(request[0] == "POST" for request in server.requests) == 2


def test_lines_of_another_tokenizer_are_not_continued(folder, tokenize, tmp_path):
    out = tmp_path / "tokens.jsonl"
    fields = {"image": "x", "model": "m", "fingerprint": moody.FINGERPRINT, "shape": [1, 1]}
    line = json.dumps(fields | {"token_ids": [1]}) + "\n"
    out.write_text(line)
    outcome = tokenize(folder, "--out", out)
    assert outcome.status == 1
    assert f"patchcache tokenize: {out} cannot be continued. The service answers" in outcome.err
    assert out.read_text() == line


@pytest.mark.parametrize(
    "text",
    [
        "hello\n",
        "{}\n",
        '{"token_ids": [1, 2], "shape": [3]}\n',
        '{"token_ids": [1], "shape": [1]}\n',
    ],
)
def test_a_file_that_is_none_of_ours_is_left_alone(text, folder, tokenize, tmp_path):
    out = tmp_path / "tokens.jsonl"
    out.write_text(text)
    outcome = tokenize(folder, "--out", out)
    assert outcome.status == 1
    assert f"{out} is not what `patchcache tokenize` writes. Pass another --out." in outcome.err
    assert out.read_text() == text


def test_the_key_comes_from_a_file_and_is_told_to_nobody(folder, tmp_path, patchcache):
    key_file = tmp_path / "key"
    key_file.write_text("a-secret\n")
    with MoodyServer(moody.problem(401, "unauthorized")) as server:
        outcome = patchcache("tokenize", folder, "--url", server.url, "--key-file", key_file)
    assert server.requests[0][2]["Authorization"] == "Bearer a-secret"
    assert outcome == (1, "", "patchcache tokenize: It is unauthorized. (unauthorized)\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "tokens.csv"], r"--out ends in .jsonl, .npz, .npy, not 'tokens.csv'."),
        (["--key-file", "no-such-file"], "No such file or directory: no-such-file"),
        (["--model", "other"], "The service has no model 'other'. It has tiny-k16."),
    ],
)
def test_what_cannot_be_is_one_line(words, message, folder, tokenize):
    outcome = tokenize(folder, *words)
    assert outcome.status == 1
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_place_without_images_is_told(tokenize, tmp_path):
    outcome = tokenize(tmp_path)
    assert outcome.status == 1
    assert "holds no images" in outcome.err


def test_a_key_file_that_is_no_text_is_told_in_a_line(folder, tmp_path, patchcache):
    key_file = tmp_path / "key"
    key_file.write_bytes(b"\xff\xfe")
    outcome = patchcache("tokenize", folder, "--url", "http://127.0.0.1:1", "--key-file", key_file)
    assert outcome.status == 1
    assert f"{key_file} is not UTF-8 text" in outcome.err


def test_a_service_that_is_away_is_told(folder, patchcache, monkeypatch):
    monkeypatch.setattr(files, "_UNTIL_READY_S", 0.01)
    with moody.nobody() as url:
        outcome = patchcache("tokenize", folder, "--url", url)
    assert outcome.status == 1
    assert "The service is not ready after 0.01 s: " in outcome.err
