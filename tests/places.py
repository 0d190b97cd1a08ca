"""Where the repository and the real data lie."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PATCHCACHE_TEST_DATA", ROOT.parent / "shared" / "data"))
