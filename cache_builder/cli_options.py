"""What several commands take, and how text becomes numbers."""

import json
from fractions import Fraction
from typing import Annotated, Any, Literal

import typer

from cache_builder.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Images = Annotated[
    str,
    typer.Option(
        help="A folder with a subfolder per class, a flat folder, or WebDataset tars "
        "(`train-{000..146}.tar`)."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Run on this Ray cluster; by default on this machine's cores."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Ray actors; by default one per CPU of the cluster.")
]
GpusPerWorker = Annotated[float, typer.Option(min=0, help="GPU share of each actor.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights file of the feature model, if it is not where the codebook says."),
]
MovedImages = Annotated[
    str | None, typer.Option("--images", help="Where the images lie now, if they have moved.")
]
CodebookCopy = Annotated[
    str | None, typer.Option("--codebook", help="A copy of the codebook, to repair with.")
]


def _numbers(option: str, text: str, count: int) -> list[float]:
    try:
        values = [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        values = []
    if len(values) != count:
        raise ConfigError(f"{option} takes {count} numbers with commas between, not {text!r}.")
    return values


def pair(option: str, text: str) -> tuple[float, float]:
    """Read LOW,HIGH; fractions such as 3/4 are numbers.

    Raises:
        ConfigError: It is not two numbers.
    """
    low, high = _numbers(option, text, 2)
    return low, high


def triple(option: str, text: str | None) -> tuple[float, float, float] | None:
    """Read R,G,B, or pass None on.

    Raises:
        ConfigError: It is not three numbers.
    """
    if text is None:
        return None
    red, green, blue = _numbers(option, text, 3)
    return red, green, blue


def number_or_all(option: str, text: str | None) -> int | Literal["all"] | None:
    """Read a positive number or the word `all`, or pass None on.

    Raises:
        ConfigError: It is neither.
    """
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} takes a number of 1 or more, or all, not {text!r}.")
    return int(text)


def model_args(assignments: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE pairs; a value is JSON, or text where it is none.

    Raises:
        ConfigError: A pair has no name or no value.
    """
    args = {}
    for assignment in assignments or []:
        name, equals, text = assignment.partition("=")
        if not name or not equals:
            raise ConfigError(f"--features-arg takes NAME=VALUE, not {assignment!r}.")
        try:
            args[name] = json.loads(text)
        except ValueError:
            args[name] = text
    return args
