"""What each method learns from the same cache, model and budget, beside a random initialisation.

    python tests/benchmarks/bench_methods.py --work DIR              # hours on two cores; resumes
    python tests/benchmarks/bench_methods.py --work DIR --seeds 1 --methods beit mapet
    python tests/benchmarks/bench_methods.py --work DIR --tables     # of what is there

Data: CIFAR-10 as JPEG files in class folders (`cifar10-25k.tar` of $PATCHCACHE_TEST_DATA, unpacked
below DIR). Codebooks of raw pixels and of MobileNetV2 features, K = 512, 8 x 8 token ids per view,
two views per picture. Every run is a process of its own with one thread; its line in
`DIR/results.jsonl` is what a later run of this command skips.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.places import DATA

WEIGHTS = DATA / "weights" / "mobilenetv2_100.same.fp16.safetensors"
K = 512
NUM_PROBED = 10_000
MODEL = {"embed_dim": 128, "depth": 4, "num_heads": 4, "init": "mae"}
DROP = {"masked_tokens": "drop", "decoder_depth": 1, "decoder_dim": 64}

MASKED = {"mask_ratio": 0.75, "mask_kind": "random", **DROP}
BOTH = ("pixel", "mobile")

# The method, what it is told, and of which tokens it can be trained.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "beit": ("beit", MASKED, BOTH),
    "beitv2": ("beit", {**MASKED, "aggregation_blocks": 1, "aggregation_layer": 3}, BOTH),
    "mapet": ("mapet", DROP, BOTH),
    # It replaces patches by pixels of centroids, and features have none.
    "ccvit": ("ccvit", {**MASKED, "mask_ratio": 0.65, "replace_ratio": 0.1}, ("pixel",)),
    "beyond": ("beyond", {**MASKED, "degradation": "zoomed_in"}, BOTH),
    "dtm": ("dtm", MASKED, BOTH),
    "mcbeit": ("mcbeit", MASKED, BOTH),
    "dmjd": ("dmjd", MASKED, BOTH),
}


def main() -> None:
    """Train and probe what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="data, caches, runs and results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--tokens", nargs="+", choices=("pixel", "mobile"), default=["pixel", "mobile"]
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--tables", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        print(json.dumps(train_and_probe(args.work, **json.loads(args.one))))
        return
    if not args.tables:
        prepare(args.work, args.tokens)
        train_missing(args)
    for table in tables(read_results(args.work)):
        Console(width=150).print(table)


def prepare(work: Path, tokens: list[str]) -> None:
    """Unpack the pictures, fit the codebooks and build the caches."""
    if not (work / "cifar10" / "test").is_dir():
        with tarfile.open(DATA / "cifar10-25k.tar") as archive:
            archive.extractall(work, filter="data")
    options = {
        "pixel": ["--image-size", "32", "--patch-size", "4", "--sample", "200000"],
        # The map of stride 16, of pictures that are four times as large: as many ids.
        "mobile": [
            "--features", f"timm:mobilenetv2_100@{WEIGHTS}", "--image-size", "128", "--layer", "3",
            "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--features-arg", "pad_type=same",
            "--sample", "100000",
        ],
    }  # fmt: skip
    for name in tokens:
        codebook = work / f"{name}.safetensors"
        if not codebook.exists():
            images = str(work / "cifar10" / "train")
            patchcache(
                "fit", "--images", images, "-k", str(K), *options[name], "--out", str(codebook)
            )
        for part, views in (("train", "2"), ("test", "1")):
            patchcache(
                "build", "--images", str(work / "cifar10" / part), "--codebook", str(codebook),
                "--views", views, "--scale", "0.4,1", "--soft-top-k", "8",
                "--workers", "0", "--out", str(work / f"cache-{name}-{part}"),
            )  # fmt: skip


def patchcache(*arguments: str) -> None:
    """Run a command of ours."""
    command = [sys.executable, "-m", "cache_builder.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train_missing(args: argparse.Namespace) -> None:
    """Run what `results.jsonl` does not have yet, several processes at a time."""
    there = {
        (row["method"], row["tokens"], row["seed"], row["steps"]) for row in read_results(args.work)
    }
    wanted = [
        {"method": method, "tokens": tokens, "seed": seed, "steps": args.steps}
        for seed in range(args.seeds)
        for tokens in args.tokens
        for method in args.methods
        if tokens in METHODS[method][2]
    ]
    missing = [run for run in wanted if tuple(run.values()) not in there]
    started = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, row in enumerate(pool.map(lambda run: run_one(args.work, run), missing), 1):
            left = (time.monotonic() - started) / number * (len(missing) - number)
            print(f"{number}/{len(missing)} {json.dumps(row)} eta {left / 60:.0f} min", flush=True)


def run_one(work: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Train and probe in a process of its own; keep the result."""
    command = [sys.executable, __file__, "--work", str(work), "--one", json.dumps(run)]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    with (work / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def train_and_probe(work: Path, method: str, tokens: str, seed: int, steps: int) -> dict[str, Any]:
    """Return accuracies, and the CPU seconds that training took."""
    from trainer import evaluate, train
    from trainer.config import parse_config

    name, objective, _ = METHODS[method]
    config = parse_config(
        {
            "data": {"batch_size": 128, "image_size": 32},
            "model": {"name": "vit_tiny_patch16_224", **MODEL},
            "objective": {"method": name, **objective},
            "optim": {"lr": 1.5e-3, "betas": [0.9, 0.95], "warmup_steps": 40},
            "run": {"steps": steps, "seed": seed, "device": "cpu", "log_every": 50},
        }
    )
    out = work / "runs" / f"{method}-{tokens}-{seed}-{steps}"
    began = time.process_time()
    summary = train.run(config, work / f"cache-{tokens}-train", out)
    cpu_s = time.process_time() - began
    result = evaluate.probe(
        out, test_data=work / f"cache-{tokens}-test", max_samples=NUM_PROBED, seed=seed,
        device="cpu",
    )  # fmt: skip
    return {
        "method": method, "tokens": tokens, "seed": seed, "steps": steps, "cpu_s": round(cpu_s, 1),
        "first_loss": summary.first_loss, "final_loss": summary.final_loss,
        **{key: round(getattr(result, key), 4)
           for key in ("knn", "knn_random", "linear", "linear_random")},
    }  # fmt: skip


def read_results(work: Path) -> list[dict[str, Any]]:
    """Return what was measured so far."""
    path = work / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Return a table per kind of token: means over the seeds, and their standard deviations."""
    found = []
    for tokens in sorted({row["tokens"] for row in rows}):
        table = Table(title=f"CIFAR-10, top-1 % of frozen features, {tokens} tokens")
        for name in ("method", "seeds", "k-NN", "gain", "linear", "gain", "loss", "CPU min"):
            table.add_column(name, justify="left" if name == "method" else "right")
        groups = defaultdict(list)
        for row in rows:
            if row["tokens"] == tokens:
                groups[row["method"]].append(row)
        every = [row for group in groups.values() for row in group]
        by_seed = {row["seed"]: row for row in every}.values()
        table.add_row(
            "random initialisation", f"{len(by_seed)}",
            spread([row["knn_random"] for row in by_seed]), "",
            spread([row["linear_random"] for row in by_seed]), "", "", "",
        )  # fmt: skip
        for method, group in groups.items():
            table.add_row(
                method, f"{len(group)}",
                spread([row["knn"] for row in group]),
                spread([row["knn"] - row["knn_random"] for row in group], "+"),
                spread([row["linear"] for row in group]),
                spread([row["linear"] - row["linear_random"] for row in group], "+"),
                f"{group[0]['first_loss']:.2f} -> "
                f"{statistics.fmean(row['final_loss'] for row in group):.2f}",
                f"{statistics.fmean(row['cpu_s'] for row in group) / 60:.1f}",
            )  # fmt: skip
        found.append(table)
    return found


def spread(values: list[float], sign: str = "") -> str:
    """Return mean and standard deviation, percent."""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    return f"{mean} +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
