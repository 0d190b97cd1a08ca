"""What several commands take, and how text becomes numbers."""

import json
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cache_builder.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
IMAGES = typer.Option(
    help="A folder with a subfolder per class, a flat folder; WebDataset tars "
    "(`train-{000..146}.tar`), zips or Parquet files, or their folder; a list of paths or "
    "URLs (.txt). On this machine, or behind s3://, gs://, https:// or any fsspec URL."
)
Images = Annotated[str, IMAGES]
Device = Annotated[
    str,
    typer.Option(help="What the model runs on: cpu, cuda, cuda:N, or auto, a GPU if there is one."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Run on this Ray cluster: HOST:PORT, or auto on one of its nodes. By default, or with "
        "local, on this machine's cores.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Ray actors; by default as many as the cluster has room for now. For more than that "
        "an autoscaling cluster adds nodes. 0: in this process, without Ray.",
    ),
]
CpusPerWorker = Annotated[
    float,
    typer.Option(min=0, help="CPUs of each actor, above 0; as many of its threads decode images."),
]
GpusPerWorker = Annotated[
    float,
    typer.Option(
        min=0,
        help="GPUs that Ray sets aside for each actor; with 0.25 four share one. 0 sets none "
        "aside, and --device alone says whether one is used.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights file of the feature model, if it is not where the codebook says."),
]
MovedImages = Annotated[
    str | None,
    typer.Option(
        "--images",
        help="Where the images lie now, or the caches that were merged into this one, if they have "
        "moved. To repair, and to tokenise images again that are not in the cache.",
    ),
]
CodebookCopy = Annotated[
    str | None,
    typer.Option("--codebook", help="A copy of the codebook, to repair the one in the cache."),
]
# By name alone: importing the trainer would bring torch along.
_TRAINER = Path(__file__).parents[1] / "trainer"
_RECIPES = sorted(path.stem for path in _TRAINER.glob("recipes/*.toml"))


def _among(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what a shell's completion asks: which of the names go on from what is typed."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _methods() -> list[str]:
    """Return the methods of training: the recipes that are named as one."""
    return [name for name in _RECIPES if (_TRAINER / f"objectives/{name}.py").is_file()]


def _tokenizers() -> list[str]:
    import importlib.metadata  # a fifth of the time in which --help answers

    entries = importlib.metadata.entry_points(group="patchcache.tokenizers")
    return sorted(entry.name for entry in entries)


Recipe = Annotated[
    str | None,
    typer.Argument(
        help=f"One of ours ({', '.join(_RECIPES)}) or a .toml.",
        autocompletion=_among(lambda: _RECIPES),
    ),
]
TrainingMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="With its own recipe, or in place of that of RECIPE.",
        autocompletion=_among(_methods),
    ),
]
InstalledTokenizer = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Of an installed tokenizer; `patchcache doctor` lists them.",
        autocompletion=_among(_tokenizers),
    ),
]


def refuse_given(context: typer.Context, names: tuple[str, ...], reason: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        ConfigError: One of `names` is on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} {reason}. Leave it out.")


def _numbers(option: str, text: str, count: int) -> list[float]:
    try:
        values = [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
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
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{option} takes a number of 1 or more, or all, not {text!r}.")
    return number


def keyword_args(option: str, assignments: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE pairs; a value is JSON, or text where it is none.

    Raises:
        ConfigError: A pair has no name or no value.
    """
    args = {}
    for assignment in assignments or []:
        name, equals, text = assignment.partition("=")
        if not name or not equals:
            raise ConfigError(f"{option} takes NAME=VALUE, not {assignment!r}.")
        try:
            args[name] = json.loads(text)
        except ValueError:
            args[name] = text
    return args


def print_json(value: Any) -> None:
    """Print a result for a script."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_lines(*lines: str) -> None:
    """Print a result for a person."""
    print("\n".join(lines))
