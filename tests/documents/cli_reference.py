"""docs/cli.md: every command with its arguments and options, taken from the code."""

import typer

from cache_builder.cli import app
from tests.documents.table import table

HEAD = """\
# Commands

Made from the code by `python -m tests.documents`; `patchcache COMMAND --help` says the same.
Results go to standard output and everything else to standard error. Exit status: 0 done, 1 failed,
2 wrong usage.
"""


def describe():
    """Return the page."""
    group = typer.main.get_command(app)
    root = group.make_context("patchcache", [next(iter(group.commands))], resilient_parsing=True)
    sections = [_section("patchcache", group, root)]
    for name, command in group.commands.items():
        context = type(root)(command, info_name=name, parent=root)
        sections.append(_section(name, command, context))
    return "\n".join([HEAD, *sections])


def _section(name, command, context):
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [_row(*parameter.get_help_record(context)) for parameter in command.params]
    parts = [f"## {name}", *paragraphs, f"```text\n{usage}\n```", table(("", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _row(names, meaning):
    text, _, notes = meaning.partition("  [")  # [default: 0; x>=1]
    cell = _escaped(" ".join(text.split()))
    if notes:
        cell += f" *{_escaped(notes.removesuffix(']'))}*"
    return f"`{names.replace('|', ' or ').replace(' range>', '>')}`", cell


def _escaped(text):
    """Guard what begins a link, emphasis, a tag or a cell, outside of code."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = parts[index].replace("<", "&lt;").replace("|", "&#124;")
        for special in "[*_":
            parts[index] = parts[index].replace(special, f"\\{special}")
    return "`".join(parts)
