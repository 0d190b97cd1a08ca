"""Record a session in a terminal: see `main` for the command.

The recording is an asciinema cast, version 2: a line of JSON about the terminal, then a line per
piece of output, [seconds, "o", text]. `asciinema play` shows it. Beside it the same is drawn as a
picture. The session is a file with a command a line; each is typed when the one before has ended,
into a bash that has no settings of its own.
"""

import argparse
import codecs
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 100, 30
READY = "\x1b]133;A\x07"  # how a shell says that it shows its prompt; terminals do not show it
LONGEST_PAUSE_S = 1.0  # that a player keeps
TIMEOUT_S = 900  # of one command
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>.{unique_id}-matrix {{font: {char_height}px monospace; white-space: pre}} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" \
height="{terminal_height}"/></clipPath>{lines}</defs>
<rect width="{width}" height="{height}" fill="#101418" rx="8"/>
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g class="{unique_id}-matrix">\
{matrix}</g></g>
</svg>
"""


class Shell:
    """A bash in a terminal, whose output is kept with its time."""

    def __init__(self, folder):
        self.events = []
        self._begin_s = time.monotonic()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        leader, follower = pty.openpty()
        ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        environment = {
            **os.environ, "TERM": "dumb", "COLUMNS": str(COLUMNS), "PS1": f"\\[{READY}\\]$ ",
        }  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"], cwd=folder, env=environment,
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        self._leader = leader
        self._wait()

    def type(self, command):
        """Type a command and wait for the next prompt."""
        os.write(self._leader, f"{command}\n".encode())
        self._wait()

    def close(self):
        """End the shell, and what it started with it."""
        os.close(self._leader)
        self._process.wait(timeout=60)

    def _wait(self):
        deadline = time.monotonic() + TIMEOUT_S
        seen = ""
        while READY not in seen:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._leader], [], [], left)[0]:
                raise TimeoutError(f"no prompt after {TIMEOUT_S} s: {seen[-500:]!r}")
            text = self._decoder.decode(os.read(self._leader, 1 << 16))
            seen += text
            at = round(time.monotonic() - self._begin_s, 3)
            self.events.append((at, text.replace(READY, "")))


def record(session, folder, cast, picture):
    """Run a session in a folder and write its cast and its picture."""
    shell = Shell(folder)
    try:
        for command in session.read_text().splitlines():
            shell.type(command)
    finally:
        shell.close()
    header = {
        "version": 2, "width": COLUMNS, "height": LINES, "idle_time_limit": LONGEST_PAUSE_S,
        "title": session.stem,
    }  # fmt: skip
    lines = [header, *([at, "o", text] for at, text in shell.events if text)]
    cast.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(cast, picture)


def draw(cast, picture):
    """Draw everything that a cast shows, from top to bottom."""
    events = [json.loads(line) for line in cast.read_text().splitlines()[1:]]
    text = "".join(event[2] for event in events).replace("\r\n", "\n").rstrip("$ \n")
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in text.split("\n"):
        shown = line.rpartition("\r")[2]
        console.print(Text(shown, style="bold" if shown.startswith("$ ") else ""))
    picture.write_text(console.export_svg(title="", code_format=SVG, unique_id="t"))


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.documents.record")
    parser.add_argument("session", type=Path, help="a file with a command a line")
    parser.add_argument("--folder", type=Path, default=Path(), help="where it runs")
    parser.add_argument("--cast", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    record(args.session, args.folder, args.cast, args.picture)
    print(f"{args.cast} and {args.picture} written", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
