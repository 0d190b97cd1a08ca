"""Programs in the blocks of the documents that no test of the documents runs, and why."""

OTHERS = {
    "ray": "needs a cluster", "kubectl": "needs a cluster", "docker": "needs an engine",
    "cd": "moves the shell", "source": "changes the shell", "export": "changes the shell",
    "kill": "ends a job of the shell", "cut": "only looks", "ls": "only looks",
    # With these two pages make keys: tests/deploy runs those blocks.
    "mkdir": "prepares a folder", "chmod": "prepares a folder", "echo": "only looks",
    "od": "only looks", "tr": "only looks",
}  # fmt: skip
"""Of others: not parsed either."""

OURS = {
    "make": "minutes each; CI makes the tests and the environment",
    "pip": "changes the environment",
    "python": "benchmarks and drawings of minutes",
    "torchrun": "needs GPUs; tests/trainer/test_distributed.py runs two ranks on CPUs",
    "train.sh": "needs two hosts; tests/deploy/test_slurm.py runs it with a recorder for torchrun",
    "sbatch": "needs Slurm; tests/deploy/test_slurm.py runs the scripts with small programs for it",
}
"""Parsed in `test_blocks.py`."""

ONLY_PARSED = {
    "patchcache fit --images imagenet/train/ -k 8192 --features open_clip:RN50x64@openai":
        "downloads weights",
    "patchcache probe timm:vit_base_patch16_224@vit.safetensors": "needs the weights of a ViT-B",
    "patchcache serve --codebook a.safetensors --codebook clip=b.safetensors": "needs a GPU",
    "patchcache serve --ray": "starts Ray; tests/tokenizers_svc/test_ray_serve.py does it once",
    "curl --data-binary @photo.jpg -H": "asks a container, which needs an engine",
}  # fmt: skip
"""Commands, by how they begin, of programs that are run where they can be."""
