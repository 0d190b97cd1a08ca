"""Codebooks and caches go to a Hub and come back, whatever happens on the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache_builder import hub_pull, hub_push, verify
from cache_builder.errors import ArtifactError, ConfigError, StorageError
from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.hub import HubFolder
from cache_builder.hub_card import codebook_card
from cache_builder.ray_cluster import ClusterOptions
from tests import factories
from tests.hub_server import TOKEN, Fault, running_hub

# huggingface_hub 2.4 uploads in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

PLACE = "someone/tokens"
HERE = ClusterOptions(num_workers=0)


@pytest.fixture
def server(monkeypatch):
    with running_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a cache of three units with a layer of a second tokenizer, in a layout."""
    root = tmp_path_factory.mktemp("built")
    images = factories.write_folder(root / "images", factories.patch_images(12))
    (images / "a/bad.png").write_bytes(b"no image")
    first = factories.write_codebook(root / "a.safetensors")
    second = factories.write_codebook(root / "b.safetensors", colours=factories.COLOURS[::-1])

    def build_in(layout):
        out = root / layout
        factories.build_cache(
            images=str(images), codebook=first, further_codebooks=(second,), out=out,
            layout=layout, unit_size=5,
        )  # fmt: skip
        return out

    return build_in


@pytest.fixture(scope="module")
def built(build):
    return build("webdataset")


@pytest.fixture
def cache(tmp_path, built):
    return Path(shutil.copytree(built, tmp_path / "cache"))


def at(server, place=PLACE, **options):
    return HubFolder(place, endpoint=server.url, pauses_s=(0.0, 0.0), **options)


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_a_cache_comes_back_as_it_was(tmp_path, server, built, build, layout):
    cache = built if layout == "webdataset" else build(layout)
    sent = hub_push.push(cache, at(server))
    assert sent.num_there == 0
    summary = hub_pull.pull_cache(at(server), tmp_path / "back")
    assert factories.contents(tmp_path / "back") == factories.contents(cache)
    assert summary.num_there == 0
    assert verify.run(tmp_path / "back", cluster=HERE).problems == []
    with TokenCache.open(tmp_path / "back") as opened:
        assert opened.manifest.fingerprint == summary.fingerprint


def test_what_is_there_is_neither_sent_nor_fetched_again(tmp_path, server, cache):
    hub_push.push(cache, at(server))
    commits = len(server.repositories[PLACE].commits)
    again = hub_push.push(cache, at(server))
    assert (again.num_sent, again.bytes_sent) == (0, 0)
    assert len(server.repositories[PLACE].commits) == commits
    hub_pull.pull_cache(at(server), tmp_path / "back")
    (tmp_path / "back" / "units" / "000001.json").unlink()
    factories.flip_byte(tmp_path / "back" / "codebook.safetensors")
    summary = hub_pull.pull_cache(at(server), tmp_path / "back")
    assert summary.num_fetched == 2
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


def test_a_push_that_stops_is_unfinished_there_and_goes_on(tmp_path, server, cache, monkeypatch):
    monkeypatch.setattr(hub_push, "_COMMIT_FILES", 5)
    stopped = []

    def stop(done, _):
        stopped.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub_push.push(cache, at(server), progress=stop)
    assert stopped == [5]
    assert len(server.files(PLACE)) == 5
    with pytest.raises(StorageError, match="its push has not finished"):
        hub_pull.pull_cache(at(server), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert hub_push.push(cache, at(server)).num_there == 5
    hub_pull.pull_cache(at(server), tmp_path / "back")
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


def test_requests_that_fail_for_a_moment_are_made_again(tmp_path, server, cache):
    server.faults += [Fault("POST", "/commit/", 500), Fault("POST", "/repos/create", 502)]
    hub_push.push(cache, at(server))
    assert server.faults == []
    assert server.counted("POST", "/commit/") == 3  # one of them failed
    server.faults += [Fault("GET", "/revision/", 503), Fault("GET", r"resolve/.*units/000001", 500)]
    hub_pull.pull_cache(at(server), tmp_path / "back")
    assert server.faults == []
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


def test_a_download_that_breaks_off_is_taken_up_where_it_was(tmp_path, server, cache):
    hub_push.push(cache, at(server))
    server.faults.append(Fault("GET", r"resolve/.*/codebook.safetensors", 0))
    hub_pull.pull_cache(at(server), tmp_path / "back")
    assert server.faults == []
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


def test_what_arrives_damaged_is_refused_and_the_cache_stays_unfinished(tmp_path, server, cache):
    hub_push.push(cache, at(server))
    whole = server.files(PLACE)["codebook.safetensors"]
    server.replace(PLACE, "codebook.safetensors", bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ArtifactError, match=r"codebook.safetensors arrived with SHA-256"):
        hub_pull.pull_cache(at(server), tmp_path / "back")
    with pytest.raises(ArtifactError, match="has not finished"):
        TokenCache.open(tmp_path / "back")
    server.replace(PLACE, "codebook.safetensors", whole)
    server.replace(PLACE, "skipped.jsonl", b"")
    with pytest.raises(ArtifactError, match=r"skipped.jsonl is not that of the commit records"):
        hub_pull.pull_cache(at(server), tmp_path / "back")
    assert not (tmp_path / "back" / "manifest.json").exists()
    hub_push.push(cache, at(server))
    hub_pull.pull_cache(at(server), tmp_path / "back")
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


@pytest.mark.parametrize("name", ["../../out", "/etc/out", "a/../../out", "C:out", "a//b", ""])
def test_a_manifest_cannot_name_files_outside_of_the_cache(tmp_path, server, cache, name):
    hub_push.push(cache, at(server))
    manifest = json.loads(server.files(PLACE)["manifest.json"])
    manifest["shards"][0]["files"][0]["path"] = name
    server.replace(PLACE, "manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ArtifactError, match=r"is no (name of a file of|file below) a cache"):
        hub_pull.pull_cache(at(server), tmp_path / "in" / "back")
    assert not list(tmp_path.rglob("out"))


def test_a_damaged_cache_is_not_sent(server, cache):
    factories.flip_byte(cache / TokenCache.open(cache).manifest.shards[0].files[0].path)
    with pytest.raises(ArtifactError, match="Nothing damaged is sent"):
        hub_push.push(cache, at(server))
    assert server.requests == []


def test_another_cache_is_not_mixed_with_the_one_that_is_there(tmp_path, server, cache):
    hub_push.push(cache, at(server))
    images = factories.write_folder(tmp_path / "images", factories.patch_images(3))
    codebook = factories.write_codebook(tmp_path / "c.safetensors")
    factories.build_cache(images=str(images), codebook=codebook, out=tmp_path / "small")
    with pytest.raises(ConfigError, match="holds another cache"):
        hub_push.push(tmp_path / "small", at(server))
    with pytest.raises(ConfigError, match="holds another cache"):
        hub_pull.pull_cache(at(server), tmp_path / "small")
    with pytest.raises(ConfigError, match="is not empty"):
        hub_pull.pull_cache(at(server), tmp_path / "images")
    assert not list(tmp_path.rglob(".arrivals"))
    # Beside each other they lie in folders.
    hub_push.push(tmp_path / "small", at(server, f"{PLACE}/small"))
    hub_pull.pull_cache(at(server, f"{PLACE}/small"), tmp_path / "back")
    assert factories.contents(tmp_path / "back") == factories.contents(tmp_path / "small")


def test_the_card_has_the_facts_and_one_of_your_own_is_left_alone(server, cache):
    hub_push.push(cache, at(server))
    card = server.files(PLACE)["README.md"].decode()
    assert "| images | 12, and 1 skipped |" in card
    assert TokenCache.open(cache).manifest.fingerprint in card
    assert f"patchcache pull {PLACE} --out cache/" in card
    server.replace(PLACE, "README.md", b"# Mine\n")
    hub_push.push(cache, at(server))
    assert server.files(PLACE)["README.md"] == b"# Mine\n"


def test_what_fetches_from_a_model_repository_says_so(tmp_path, server, cache):
    codebook = factories.write_codebook(tmp_path / "codebook.safetensors")
    for source, place, name, out in (
        (cache, PLACE, "", "cache/"),
        (codebook, "someone/other", "/codebook.safetensors", "codebook.safetensors"),
    ):
        hub_push.push(source, at(server, place, repo_type="model"))
        card = server.files(place)["README.md"].decode()
        assert f"patchcache pull {place}{name} --repo-type model --out {out}\n" in card
    assert at(server, revision="v1").options == " --revision v1"


def test_the_card_of_a_tokenizer_that_was_not_fitted_tells_of_no_fit():
    rule = PixelRule(size=16, patch_size=4)
    foreign = Codebook(
        np.empty((1, 50, 0), np.float32), np.zeros((1, 50), np.int64), metric="l2",
        pixel_rule=rule, extractor=ExtractorSpec(id="foreign:dalle"),
    )  # fmt: skip
    card = codebook_card(foreign, f"{PLACE}/c.safetensors", "")
    assert "| token ids | 50, without centroids |" in card
    assert "fitted to" not in card
    fitted = codebook_card(factories.colour_codebook(), f"{PLACE}/c.safetensors", "")
    assert "| centroids | 6 of " in fitted
    assert "| fitted to | " in fitted


def test_a_codebook_comes_back_and_a_broken_one_replaces_nothing(tmp_path, server):
    path = factories.write_codebook(tmp_path / "codebook.safetensors")
    sent = hub_push.push(path, at(server))
    assert (sent.place, sent.num_sent) == (f"{PLACE}/codebook.safetensors", 1)
    back = tmp_path / "back.safetensors"
    summary = hub_pull.pull_codebook(at(server), "codebook.safetensors", back)
    assert back.read_bytes() == path.read_bytes()
    assert summary.fingerprint == Codebook.load(path).fingerprint
    server.replace(PLACE, "codebook.safetensors", b"text")
    with pytest.raises(ArtifactError, match="cannot be read as a codebook"):
        hub_pull.pull_codebook(at(server), "codebook.safetensors", back)
    assert back.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "back.safetensors",
        "codebook.safetensors",
    ]


def test_who_may_not_see_or_write_is_told_so_and_the_token_is_in_no_message(
    tmp_path, server, caplog, monkeypatch
):
    path = factories.write_codebook(tmp_path / "codebook.safetensors")
    hub_push.push(path, at(server))
    assert server.repositories[PLACE].private
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    messages = []
    for action in (
        lambda: hub_pull.pull_codebook(at(server), "codebook.safetensors", tmp_path / "b"),
        lambda: hub_push.push(path, at(server)),
        lambda: hub_pull.pull_cache(at(server, "someone/nothing"), tmp_path / "b"),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        messages.append(str(caught.value))
    assert "the token in HF_TOKEN may not see it" in messages[0]
    # The places for large files are signed, and asked without it.
    assert server.authorisations - {None} == {f"Bearer {TOKEN}", "Bearer hf_of_somebody_else"}
    assert "hf_of" not in " ".join(messages) + caplog.text


@pytest.mark.parametrize("place", ["tokens", "a/b/../c", "a/b/", "https://a/b", "a b/c", "./b", ""])
def test_what_is_no_place_on_the_hub_is_refused(place):
    with pytest.raises(ConfigError, match="is not a place on the Hub"):
        HubFolder(place)


@pytest.mark.slow
def test_the_commands_push_and_pull(tmp_path, server, built):
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip

    def run(*words):
        return subprocess.run(
            [Path(sys.executable).parent / "patchcache", *words], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    sent = run("push", str(built), PLACE)
    assert (sent.returncode, sent.stderr.count("Traceback")) == (0, 0), sent.stderr
    assert sent.stdout.startswith("sent  ")
    fetched = run("pull", PLACE, "--out", "back", "--json")
    assert fetched.returncode == 0, fetched.stderr
    assert json.loads(fetched.stdout)["num_fetched"] == len(factories.contents(built))
    assert factories.contents(tmp_path / "back") == factories.contents(built)
    wrong = run("pull", f"{PLACE}/a.safetensors", "--out", "back")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (1, 1)
