"""The recorder of sessions, and the session that the page for newcomers shows."""

import json

from tests.documents.blocks import Block, blocks_of, commands_of
from tests.documents.pages import DOCS
from tests.documents.record import record
from tests.documents.test_blocks import check

SESSION = DOCS.parent / "tests" / "documents" / "first_hour.sh"
PAGE, CAST = DOCS / "first-hour.md", DOCS / "first-hour.cast"


def shown(cast):
    events = [json.loads(line) for line in cast.read_text().splitlines()[1:]]
    return "".join(text for _, _, text in events).replace("\r\n", "\n")


def typed(lines):
    return [line[2:] for line in lines if line.startswith("$ ")]


def test_a_session_is_recorded_with_what_its_commands_print_and_drawn(tmp_path):
    session, cast = tmp_path / "s.sh", tmp_path / "s.cast"
    session.write_text("echo $((6 * 7))\nfalse || echo no\n")
    record(session, tmp_path, cast, tmp_path / "s.svg")
    assert shown(cast) == "$ echo $((6 * 7))\n42\n$ false || echo no\nno\n$ "
    header, *events = map(json.loads, cast.read_text().splitlines())
    assert (header["version"], header["width"]) == (2, 100)
    assert [at for at, *_ in events] == sorted(at for at, *_ in events)
    assert ">42</text>" in (tmp_path / "s.svg").read_text()


def test_the_session_runs_commands_that_there_are():
    session = Block(SESSION, 1, "bash", SESSION.read_text())
    for words in commands_of(session):
        check(words)


def test_the_page_shows_the_commands_of_the_session_and_what_they_printed_when_it_was_recorded():
    blocks = [block for block in blocks_of(PAGE) if block.language == "console"]
    on_page = [line for block in blocks for line in block.text.splitlines()]
    recorded = [line.rpartition("\r")[2].rstrip() for line in shown(CAST).splitlines()]
    commands = SESSION.read_text().splitlines()
    assert typed(on_page) == typed(recorded) == commands
    rest = iter(recorded)
    assert [line for line in on_page if line not in rest] == []  # in order; some are left out
