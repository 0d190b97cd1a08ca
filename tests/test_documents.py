"""What the documents list and name."""

import re

from cache_builder.cli import app
from tests.places import ROOT


def test_the_readme_lists_every_command():
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = (command.name or command.callback.__name__ for command in app.registered_commands)
    assert sorted(rows) == sorted(commands)


def test_no_document_names_a_package_index():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy" / "constraints.txt"):
        assert not re.search(r"--(extra-)?index-url|pypi\.org|/simple/", path.read_text()), path
