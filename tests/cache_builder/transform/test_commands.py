"""The commands convert, merge and subset, as they are typed."""

import re
import shlex

import pytest

from cache_builder.cli import app
from tests import factories
from tests.cache_builder.transform.support import samples_of


def example(name):
    (text,) = (
        " ".join(command.callback.__doc__.split())
        for command in app.registered_commands
        if command.callback.__name__ == name
    )
    return shlex.split(re.search(r"Example: `patchcache ([^`]+)`", text)[1])


@pytest.mark.ray
@pytest.mark.slow
def test_the_examples_of_the_commands_run(make, tmp_path, patchcache, ray_cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()
    make("train")
    other = {f"c/{path[2:]}": data for path, data in factories.photo_images(3).items()}
    make("more", images=str(factories.write_folder(tmp_path / "other", other)))
    for name, num_workers, words, lines in (
        ("convert", 1, [], [r"images +7, 2 views each, 1 skipped", r"size .* in 3 shards\n"]),
        ("convert", 0, [], [r"in 3 shards, 3 of them kept from before"]),
        ("merge", 0, [], [r"images +10, 2 views", r"3 classes united by name; 1 caches had other"]),
        ("subset", 0, ["--labels", "a", "--views", 1], [r"images +4, 1 views each, 0 skipped"]),
    ):
        outcome = patchcache(*example(name), *words, "--workers", num_workers)
        assert (outcome.status, outcome.err) == (0, ""), outcome.err
        for line in lines:
            assert re.search(line, outcome.out), (name, line, outcome.out)
        out = example(name)[example(name).index("--out") + 1]
        assert f"next         patchcache verify {out} --retokenize 100" in outcome.out
    (tmp_path / "keys.txt").write_text("b/001\n\na/000\n")
    outcome = patchcache(
        "subset", "cache", "--keys", "keys.txt", "--out", "two", "--workers", 0, "--json"
    )
    assert '"num_samples": 2' in outcome.out
    assert list(samples_of("two")) == ["a/000", "b/001"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert nowhere --out out", "nowhere is not a cache: it has neither manifest.json"),
        ("merge nowhere --out out", "nowhere is not a cache"),
        ("subset nowhere --keys no.txt --out out", "--keys no.txt cannot be read as text: "),
        ("subset nowhere --keys empty.txt --out out", "--keys empty.txt names no sample."),
    ],
)
def test_a_mistake_is_one_line(patchcache, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    outcome = patchcache(*words.split())
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith(f"patchcache {words.split()[0]}: {message}")
    assert len(outcome.err.splitlines()) == 1
