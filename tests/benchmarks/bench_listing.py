"""How fast millions of keys are listed, and in how much memory.

    python -m tests.benchmarks.bench_listing [NUM_KEYS [SOURCE ...]]

Each case runs in a process of its own. `list` is the time until the listing is known (keys sorted,
doubles excluded), `plan` the time to make every plan unit's JSON from it, as `build` does twice.
Times are those of the CPU. Peak memory is that of the process above what it had after its imports.
"""

import io
import multiprocessing
import resource
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from cache_builder.formats.manifest import to_json
from cache_builder.sources import open_source
from cache_builder.sources.classes import FolderClasses
from cache_builder.sources.listing import Row, list_rows

_PER_TAR = 10_000


def _generated(folder, num_keys):
    """Rows in no order, as a walk through folders gives them: sorting and slicing alone."""
    rows = (
        Row(f"n{i * 7919 % 1000:08d}/{i * 104_729 % num_keys:010d}", f"{i:010d}.jpg", "a")
        for i in range(num_keys)
    )
    return list_rows("folder", "generated", rows, FolderClasses(), None)


def _list(folder, num_keys):
    path = Path(folder) / "t.txt"
    with path.open("w") as file:
        for i in range(num_keys):
            file.write(f"class{i % 1000}/{i * 104_729 % num_keys:010d}.jpg\t{i % 1000}\n")
    return lambda: open_source(str(path)).scan(None)


def _tars(folder, num_keys):
    for start in range(0, num_keys, _PER_TAR):
        with tarfile.open(Path(folder) / f"{start:09d}.tar", "w") as tar:
            for i in range(start, min(start + _PER_TAR, num_keys)):
                tar.addfile(tarfile.TarInfo(f"{i:010d}.jpg"), io.BytesIO())
    return lambda: open_source(folder).scan(None)


def _zip(folder, num_keys):
    path = Path(folder) / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num_keys):
            archive.writestr(f"class{i % 1000}/{i:010d}.jpg", b"")
    return lambda: open_source(str(path)).scan(None)


def _folder(folder, num_keys):
    for i in range(1000):
        (Path(folder) / f"class{i}").mkdir()
    for i in range(num_keys):
        (Path(folder) / f"class{i % 1000}/{i:010d}.jpg").touch()
    return lambda: open_source(folder).scan(None)


def _peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(make, folder, num_keys, results):
    scan = (lambda: make(folder, num_keys)) if make is _generated else make
    before = _peak_mb()
    started_s = time.process_time()
    listing = scan()
    listed_s = time.process_time() - started_s
    num_bytes = sum(len(to_json(unit)) for unit in listing.units)
    planned_s = time.process_time() - started_s - listed_s
    results.put((listing.num_units, listed_s, planned_s, num_bytes, _peak_mb() - before))


def main():
    """Print one line per kind of source."""
    num_keys = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
    cases = {"generated": _generated, "list": _list, "tars": _tars, "zip": _zip, "folder": _folder}
    names = sys.argv[2:] or list(cases)
    print(f"{num_keys:,} keys")
    print(f"{'source':10} {'units':>7} {'list s':>7} {'keys/s':>9} {'plan s':>7} {'keys/s':>9} "
          f"{'plan MB':>8} {'peak MB':>8}")  # fmt: skip
    context = multiprocessing.get_context("fork")
    for name in names:
        make = cases[name]
        with tempfile.TemporaryDirectory() as folder:
            scan = make if make is _generated else make(folder, num_keys)
            results = context.Queue()
            process = context.Process(target=_measure, args=(scan, folder, num_keys, results))
            process.start()
            units, listed_s, planned_s, num_bytes, peak_mb = results.get()
            process.join()
        print(f"{name:10} {units:7,} {listed_s:7.1f} {num_keys / listed_s:9,.0f} {planned_s:7.1f} "
              f"{num_keys / planned_s:9,.0f} {num_bytes / 1e6:8.0f} {peak_mb:8.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
