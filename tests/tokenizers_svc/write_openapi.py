"""Write what the service says of itself: python -m tests.tokenizers_svc.write_openapi"""

import json
from pathlib import Path

from tests.tokenizers_svc.support import make_tokenizer
from tokenizers_svc.app import create_app

GOLDEN = Path(__file__).parent / "openapi.json"


def describe():
    return json.dumps(create_app(make_tokenizer()).openapi(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(describe())
