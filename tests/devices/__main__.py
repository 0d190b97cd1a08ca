"""The tests of this folder on a GPU, without pytest: `make gpu-check`.

    python -m tests.devices                 # on the GPU
    python -m tests.devices --device cpu    # on the CPU, to see that they run
    python -m tests.devices nearest draws   # those whose name holds one of these words

It asks for torch, torchvision, timm, numpy and safetensors, as images for GPUs have them, and for
nothing else. A test is a function of `device`, and of `tmp_path` if it writes files.

Exit status: 0 all passed, or there is no CUDA device and each is skipped, which the last line says;
1 one failed; 2 the command is wrong.
"""

import argparse
import importlib
import inspect
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.devices import bare

NO_DEVICE = "torch sees no CUDA device"


def main() -> int:
    """Run the tests, and say a line of each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("words", nargs="*", help="of names; all tests without any")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    args = parser.parse_args()
    is_there = args.device == "cpu" or torch.cuda.is_available()
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    bare.complete()
    torch.set_num_threads(1)
    for name, test in found_tests(args.words):
        began = time.perf_counter()
        outcome = run(test, args.device) if is_there else "skipped"
        outcomes[outcome] += 1
        reason = f"{time.perf_counter() - began:.1f} s" if is_there else NO_DEVICE
        print(f"{outcome.upper() if outcome == 'failed' else outcome} {name} ({reason})")
    if not sum(outcomes.values()):
        parser.error(f"no test is called like {' or '.join(args.words)}")
    where = torch.cuda.get_device_name(args.device) if torch.cuda.is_available() else NO_DEVICE
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    print(f"torch {torch.__version__}, device {args.device}, {where}: {counts}")
    return 1 if outcomes["failed"] else 0


def found_tests(words: list[str]) -> Iterator[tuple[str, Callable[..., None]]]:
    """Yield the tests of the folder by name."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.devices.{path.stem}")
        for name, test in vars(module).items():
            full = f"{path.stem}::{name}"
            if name.startswith("test_") and (not words or any(word in full for word in words)):
                yield full, test


def run(test: Callable[..., None], device: str) -> str:
    """Run a test; what it raises is printed."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"device": device, "tmp_path": Path(folder)}
        wanted = inspect.signature(test).parameters
        try:
            test(**{name: given[name] for name in wanted})
        except Exception:  # noqa: BLE001  whatever a test raises, it has failed
            traceback.print_exc()
            return "failed"
    return "passed"


if __name__ == "__main__":
    sys.exit(main())
