"""The trainer brings in no tokenizer and no server."""

import pkgutil
import subprocess
import sys

import trainer

BANNED = (
    "ray", "faiss", "open_clip", "fastapi", "cache_builder.tokenizers", "cache_builder.fit",
    "cache_builder.build", "cache_builder.kmeans",
)  # fmt: skip


def test_no_module_of_the_trainer_brings_in_a_tokenizer_or_a_server():
    names = [module.name for module in pkgutil.walk_packages(trainer.__path__, "trainer.")]
    assert len(names) > 10
    code = f"import {', '.join(names)}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(BANNED)
