"""What the documents claim is tried out."""

import re
from pathlib import Path

import pytest

from cache_builder.cli import app
from tests.places import ROOT
from tests.tokenizers_svc.support import jpeg, make_tokenizer, serving
from tokenizers_svc.app import create_app


def code_blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_reader_in_the_formats_page_reads_the_golden_cache(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (reader,) = code_blocks(ROOT / "docs" / "formats.md", "python")
    exec(compile(reader, "formats.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == "a/000 (3, 4, 4) uint16"


def test_the_page_on_caches_reads_one(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "tests" / "golden" / "v1")
    (reader,) = code_blocks(ROOT / "docs" / "caches.md", "python")
    exec(compile(reader.replace('"cache"', '"webdataset"'), "caches.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] == "a/000"


@pytest.fixture(scope="module")
def client():
    """A client of a small service."""
    with serving(create_app(make_tokenizer())) as client:
        yield client


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder to work in, with what the pages on the service name."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "a.jpg", "photos/0.jpg", "photos/1.jpg", "demo/photos/astronaut.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(jpeg())
    Path("photos/2.jpg").write_bytes(b"text")


def test_the_readme_asks_a_service(client, photos, capsys):
    (asking,) = code_blocks(ROOT / "README.md", "python")
    asking = asking.replace("http://127.0.0.1:8000", str(client.base_url))
    exec(compile(asking, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("(4, 4) uint16 ")
    assert "\n0 [[" in out
    assert "\n1 b.jpg cannot be read: No such file or directory\n" in out


def test_the_page_of_the_client_prints_what_it_says(client, photos, capsys):
    page = ROOT / "docs" / "service-client.md"
    names = {"URL": str(client.base_url)}
    for block in code_blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    names["client"].close()
    names["impatient"].close()
    out = capsys.readouterr().out
    for promised in (
        "(4, 4) uint16\nTrue\n",
        "View(top=0, left=0, height=32, width=32, hflip=True)\nTrue True\n(1, 16, 192)\n",
        "2 The picture is refused: ",
        "0 True\n1 True\nnot-an-image 415\nThe service does not answer:\n",
    ):
        assert promised in out


def test_the_readme_lists_every_command():
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = (command.name or command.callback.__name__ for command in app.registered_commands)
    assert sorted(rows) == sorted(commands)


def test_no_document_names_a_package_index():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy" / "constraints.txt"):
        assert not re.search(r"--(extra-)?index-url|pypi\.org|/simple/", path.read_text()), path
