"""Command lines of files under deploy/, read by the parsers that would read them, and not run."""

import shlex

import typer

from cache_builder.cli import app


def parse_patchcache(words):
    """Parse `patchcache COMMAND ...`; return the command's name and the values of its options."""
    program, name, *rest = words
    assert program == "patchcache"
    command = typer.main.get_command(app).commands[name]
    return name, command.make_context(name, rest).params


def parse_ray(words):
    """Parse `ray COMMAND ...`; return the command's name and the values of its options."""
    from ray.scripts.scripts import cli

    program, name, *rest = words
    assert program == "ray"
    return name, cli.commands[name].make_context(name, rest).params


def parse_torchrun(words):
    """Parse `torchrun ... -m cache_builder ...`; return its options and those of ours."""
    from torch.distributed.run import get_args_parser

    program, *rest = words
    assert program == "torchrun"
    options = get_args_parser().parse_args(rest)
    assert (options.module, options.training_script) == (True, "cache_builder")
    return options, parse_patchcache(["patchcache", *options.training_script_args])


def shown_in(path, program):
    """Return the command lines that begin with `program` in the comments of a file."""
    lines = [line.lstrip("# ").strip() for line in path.read_text().splitlines() if line[:1] == "#"]
    return [words for line in lines if (words := _split(line))[:1] == [program]]


def _split(line):
    try:
        return shlex.split(line)
    except ValueError:  # an apostrophe in prose
        return []
