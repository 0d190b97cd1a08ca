"""No option without effect: what may be set is read, and every flag of the commands is used."""

import ast
import dis
import inspect
import re

from cache_builder.cli import app
from tests.places import ROOT

PACKAGES = ("cache_builder", "tokenizers_svc", "trainer")
OPTIONS = re.compile(r"(Options|Config|Limits)$")


class Module:
    """What a module says of options: its classes, what it annotates, and what it reads."""

    def __init__(self, text):
        self.classes = []
        self.arguments = []  # names with their annotations
        self.fields = []
        self.reads = []  # (line, object, attribute); `limits` of `self._limits.lanes`
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and OPTIONS.search(node.name):
                self.classes.append(node)
            elif isinstance(node, ast.arg) and node.annotation:
                self.arguments.append((node.arg, ast.unparse(node.annotation)))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.fields.append((node.target.id, ast.unparse(node.annotation)))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = getattr(node.value, "attr", None) or getattr(node.value, "id", "")
                self.reads.append((node.lineno, holder.lstrip("_"), node.attr))


def those_of(annotations, names):
    """Return what is annotated as one of some classes."""
    wanted = re.compile(rf"\b({'|'.join(names)})\b")
    return {name for name, kind in annotations if wanted.search(kind)}


def unread(modules):
    """Return Class.field of the options that no code outside their class reads.

    A field is read where it is taken from an argument that is annotated as its class, or as a
    parent of it, or from a field of another class that is.
    """
    found = []
    for home in modules:
        for options in home.classes:
            names = {options.name, *map(ast.unparse, options.bases)}
            holders = set().union(*(those_of(module.fields, names) for module in modules))
            inside = range(options.lineno, options.end_lineno + 1)
            read = {
                attribute
                for module in modules
                for objects in [holders | those_of(module.arguments, names)]
                for line, holder, attribute in module.reads
                if holder in objects and not (module is home and line in inside)
            }
            fields = [line.target.id for line in options.body if isinstance(line, ast.AnnAssign)]
            found += [f"{options.name}.{field}" for field in fields if field not in read]
    return found


def test_every_field_of_the_options_is_read():
    paths = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    # The command line only hands them on.
    modules = [Module(path.read_text()) for path in paths if not path.name.startswith("cli")]
    assert sum(len(module.classes) for module in modules) > 20
    assert unread(modules) == []


def test_a_field_that_is_written_and_never_read_is_found():
    texts = (
        "class FitOptions:\n    k: int\n    seed: int\n    grid: int\n",
        "def run(options: FitOptions, other):\n    print(options.k, other.seed)\n",
        "def show(options: Settings):\n    print(options.grid)\n",
    )
    assert unread([Module(text) for text in texts]) == ["FitOptions.seed", "FitOptions.grid"]


def unused(function):
    """Return the parameters of a function that its body never looks at."""
    loads = [line.argval for line in dis.get_instructions(function) if "LOAD" in line.opname]
    return sorted(set(inspect.signature(function).parameters) - {*loads})


def test_every_flag_of_the_command_line_is_used():
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = [command.callback for group in groups for command in group.registered_commands]
    assert len(commands) > 15
    assert {function.__name__: unused(function) for function in commands if unused(function)} == {}


def test_a_flag_that_its_command_forgets_is_found():
    def command(shown, hidden, inner):
        return [shown, lambda: inner]

    assert unused(command) == ["hidden"]
