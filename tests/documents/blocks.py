"""The fenced blocks of the documents, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

SHELL = frozenset({"bash", "sh", "console"})  # languages of blocks of commands
_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})(.*)$")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
_JOINTS = {"|", "||", "&&", ";", "&"}
_BEFORE_A_COMMAND = {"do", "then", "else", "!"}
_NO_COMMAND = {"for", "if", "while", "done", "fi"}
_REDIRECTION = re.compile(r"^[<>]")
_NUMBER_OF_A_STREAM = re.compile(r"(?<=\s)\d(?=[<>])")


class Block(NamedTuple):
    """One fenced block."""

    page: Path
    line: int  # of its first fence, from 1
    language: str
    text: str

    @property
    def where(self):
        return f"{self.page.name}:{self.line}"


def blocks_of(page):
    """Return the blocks of a page, in order."""
    found, opened, lines = [], None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, lines = (number, fence[2], fence[3].strip()), []
        elif opened and fence and fence[2] == opened[1] and not fence[3].strip():
            found.append(Block(page, opened[0], opened[2], "\n".join([*lines, ""])))
            opened = None
        elif opened:
            lines.append(line)
    assert opened is None, f"{page.name}: the block of line {opened[0]} has no end"
    return found


def texts_of(page, language):
    """Return the texts of a page's blocks of one language, in order."""
    return [block.text for block in blocks_of(page) if block.language == language]


def commands_of(block):
    """Return the commands of a block of a shell, each as its words.

    Of a session (`console`) the lines that begin with a prompt are commands, and the others are
    what they print; of `bash` and `sh` every line is one. Comments, assignments before a command
    and redirections are left out; a pipe joins two commands.
    """
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.lstrip()[2:] for line in lines if line.lstrip().startswith("$ ")]
    return [command for line in lines for command in _commands(line)]


def _commands(line):
    words = shlex.shlex(_NUMBER_OF_A_STREAM.sub("", line), posix=True, punctuation_chars="|&;<>")
    words.whitespace_split = True
    found = [[]]
    skipped = False
    for word in words:
        if word in _JOINTS:
            found.append([])
        elif _REDIRECTION.match(word):
            skipped = True  # what follows is a file
        elif skipped:
            skipped = False
        elif found[-1] or not (_ASSIGNMENT.match(word) or word in _BEFORE_A_COMMAND):
            found[-1].append(word)
    return [command for command in found if command and command[0] not in _NO_COMMAND]
