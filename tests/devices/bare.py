"""What an image that has torch and little else is given."""

import importlib.util
import os
import sys
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def complete() -> None:
    """Let this process and those that it starts find what stands for pydantic, if it is missing."""
    if importlib.util.find_spec("pydantic") is None:
        sys.path.append(str(STAND_INS))
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [others]), str(STAND_INS)])
