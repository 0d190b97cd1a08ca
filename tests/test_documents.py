"""What the documents claim is tried out."""

import re
from pathlib import Path

from cache_builder.cli import app

ROOT = Path(__file__).parent.parent


def code_blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_reader_in_the_formats_page_reads_the_golden_cache(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (reader,) = code_blocks(ROOT / "docs" / "formats.md", "python")
    exec(compile(reader, "formats.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == "a/000 (3, 4, 4) uint16"


def test_the_readme_reads_a_cache(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "tests" / "golden" / "v1")
    (reader,) = code_blocks(ROOT / "README.md", "python")
    exec(compile(reader.replace('"cache"', '"webdataset"'), "README.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] == "a/000"


def test_the_readme_lists_every_command():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(command.callback.__name__ for command in app.registered_commands)


def test_no_document_names_a_package_index():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy" / "constraints.txt"):
        assert not re.search(r"--(extra-)?index-url|pypi\.org|/simple/", path.read_text()), path
