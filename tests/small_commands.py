"""Commands of the documents and of the help, as small as a test needs them."""

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.servers import free_port

BIN = Path(sys.executable).parent
SMALLER = {
    "fit": ["-k", "8", "--image-size", "32", "--patch-size", "8", "--iterations", "5"],
    "build": ["--views", "2"],
    "train": [
        "--set", "run.steps=4", "--set", "data.batch_size=8", "--set", "model.embed_dim=32",
        "--set", "model.num_heads=2", "--set", "optim.warmup_steps=1",
        "--set", "run.checkpoint_every=2", "--set", "run.log_every=1",
        "--set", "data.num_workers=0",
    ],
    "finetune": [
        "--set", "data.batch_size=8", "--set", "run.epochs=2", "--set", "optim.warmup_epochs=1",
        "--set", "data.num_workers=0",
    ],
}  # fmt: skip
"""By command: options that come after those that are shown."""


@contextlib.contextmanager
def served(folder, words):
    """Run `patchcache serve ...` as a process, on a free port; gives its URL once it is ready."""
    port = free_port()
    command = [BIN / "patchcache", *words, "--port", str(port)]
    service = subprocess.Popen(command, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 150
        while True:
            assert service.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        service.terminate()
        assert service.wait(timeout=30) == 0
