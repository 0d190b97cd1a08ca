"""Damage every format a hundred thousand times, and print what its readers made of it.

    python -m tests.fuzz --inputs 100000                        all formats; `make fuzz`
    python -m tests.fuzz --format checkpoint --number 17        one input again, with its traceback

Fails if any input ended in anything but an error of ours that says what, which and what now, or an
answer that is right, or one that the format's exceptions (`tests/fuzz/formats.py`) name.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.formats import FORMATS, Format
from tests.fuzz.worker import Result, damage, draw, judge, run

_SHOWN = 3  # failures of a format


class Row(NamedTuple):
    """What came of the inputs of one format."""

    form: Format
    kinds: Counter[str]
    worst_s: float
    peak_bytes: int
    failures: list[Result]
    seconds: float

    def text(self) -> str:
        """Return a line of the table."""
        counts = "".join(
            f"{self.kinds[kind]:>9,}" for kind in ("error", "right", "told", "other", "failure")
        )
        return (
            f"{self.form.name:<26}{self.kinds.total():>9,}{counts}{1000 * self.worst_s:>9.0f}"
            f"{self.peak_bytes / 1e6:>8.0f}{self.seconds:>8.0f}"
        )


HEAD = (
    f"{'format':<26}{'inputs':>9}{'errors':>9}{'right':>9}{'verify':>9}{'other':>9}{'FAILED':>9}"
    f"{'worst ms':>9}{'+MB':>8}{'s':>8}"
)


def fuzz(form: Format, folder: Path, numbers: range, seed: int) -> Row:
    """Damage one format; `folder` is empty."""
    made = folder / "made"
    made.mkdir(parents=True)
    form.make(made)
    started_s = time.monotonic()
    kinds, failures = Counter[str](), list[Result]()
    worst_s, peak_bytes = 0.0, 0
    for result in run(form, made, folder / "damaged", numbers, seed):
        kinds[result.kind] += 1
        worst_s = max(worst_s, result.seconds)
        peak_bytes = max(peak_bytes, result.grown_bytes)
        if result.kind == "failure":
            failures.append(result)
    return Row(form, kinds, worst_s, peak_bytes, failures, time.monotonic() - started_s)


def share_of(form: Format, num_inputs: int) -> int:
    """Return how many of all inputs a format gets."""
    return round(num_inputs * form.share / sum(each.share for each in FORMATS.values()))


def again(form: Format, folder: Path, seed: int, number: int) -> None:
    """Read one input in this process; what the reader raises is seen with its traceback."""
    form.make(folder)
    whole = {path: path.read_bytes() for path in form.files(folder)}
    answer = form.read(folder)
    damaged = draw(form, whole, seed, number)
    print(f"{damaged.path} {damaged.how}, forged: {damaged.is_forged}")
    before, after = whole[damaged.path], damaged.data or b""
    pairs = enumerate(zip(before, after, strict=False))
    same = next((place for place, (old, new) in pairs if old != new), 0)
    for name, data in (("was", before), ("is", after)):
        shown = data[max(0, same - 60) : same + 140]
        print(f"{name:>4} {len(data):,} bytes, from {same:,}: {shown!r}")
    damage(damaged)
    print(judge(form, folder, damaged, answer))
    form.read(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all formats together")
    parser.add_argument("--format", choices=sorted(FORMATS), action="append", help="only these")
    parser.add_argument("--number", type=int, help="only this input of the one format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    options = parser.parse_args()
    forms = [FORMATS[name] for name in options.format or FORMATS]
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="fuzz", dir=shared if shared.is_dir() else None
    ) as name:
        if options.number is not None:
            again(forms[0], Path(name), options.seed, options.number)
            return
        print(HEAD, flush=True)
        rows = []
        for number, form in enumerate(forms):
            numbers = range(options.first, options.first + share_of(form, options.inputs))
            rows.append(fuzz(form, Path(name) / str(number), numbers, options.seed))
            print(rows[-1].text(), flush=True)
            for failure in rows[-1].failures[:_SHOWN]:
                print(f"    input {failure.number}: {failure.detail}", flush=True)
    total = sum((row.kinds for row in rows), Counter[str]())
    print(f"{total.total():,} inputs, {total['failure']:,} failed")
    sys.exit(bool(total["failure"]))


if __name__ == "__main__":
    main()
