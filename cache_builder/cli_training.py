"""The commands that train a ViT, measure it and hand it on."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cache_builder.cli_options import (
    Device,
    Json,
    Recipe,
    TrainingMethod,
    print_json,
    print_lines,
)

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the recipe, a.b=value; may be given many times."),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint or the directory of a run, an exported .safetensors, or "
        "timm:NAME[@weights.safetensors]."
    ),
]
_LABELLED = (
    "Labelled images: a folder with a subfolder per class, tars, zips or Parquet files, or a cache"
)
ImagesOfCache = Annotated[
    str | None,
    typer.Option("--images", help="Where the images of a cache without images lie now."),
]
Decoders = Annotated[int, typer.Option(min=0, help="Processes that decode.")]


def train(
    cache: Annotated[str, typer.Option(help="A finished cache.")],
    recipe: Recipe = None,
    method: TrainingMethod = None,
    out: Annotated[
        Path | None, typer.Option(help="Where checkpoints and logs go; default runs/RECIPE-METHOD.")
    ] = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> None:
    """Pre-train a ViT from a cache; the same command continues a run that was stopped.

    On several GPUs: `torchrun --nproc-per-node gpu -m cache_builder train ...`

    Example: `patchcache train beit_drop --cache cache/ --out run/ --set run.steps=1000`
    """
    from cache_builder.console import train_lines
    from trainer import distributed
    from trainer import train as job
    from trainer.config import load_config

    config = load_config(recipe, assignments or [], method=method)
    names = [Path(recipe or "").stem, method or ""]
    summary = job.run(config, cache, out or Path("runs") / "-".join(filter(None, names)))
    if not distributed.is_first_process():
        return
    if as_json:
        print_json({**summary._asdict(), "checkpoint": str(summary.checkpoint)})
        return
    print_lines(*train_lines(summary))


def probe(
    model: Model,
    data: Annotated[
        str | None, typer.Option(help=f"{_LABELLED}; default the cache trained on.")
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="Test on these; default a fifth of --data.")
    ] = None,
    images: ImagesOfCache = None,
    max_samples: Annotated[
        int, typer.Option(min=1, help="Most samples of each place, chosen by key.")
    ] = 10_000,
    workers: Decoders = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure frozen features by k-NN and linear probe, beside a random initialisation.

    Example: `patchcache probe run/checkpoints/step_00001000.pt`
    """
    from cache_builder.console import probe_lines
    from trainer import evaluate

    result = evaluate.probe(
        model,
        data=data,
        test_data=test_data,
        images=images,
        max_samples=max_samples,
        num_workers=workers,
        device=device,
    )
    if as_json:
        print_json(result._asdict())
        return
    print_lines(*probe_lines(result))


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe of ours (vit_base, small) or a .toml.")],
    model: Annotated[
        str,
        typer.Option(
            help="What to begin with: a checkpoint or the directory of a run, an exported "
            ".safetensors, or timm:NAME[@weights.safetensors]."
        ),
    ],
    data: Annotated[str, typer.Option(help=f"{_LABELLED}.")],
    test_data: Annotated[
        str | None, typer.Option(help="Test on these; default a fifth of --data.")
    ] = None,
    images: ImagesOfCache = None,
    out: Annotated[
        Path | None, typer.Option(help="Where checkpoints and logs go; default runs/RECIPE.")
    ] = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a ViT as a classifier; the same command continues a run that was stopped.

    Example: `patchcache finetune small --model run/ --data photos/ --out tuned/`
    """
    from cache_builder.console import finetune_lines
    from trainer import finetune as job
    from trainer.finetune_config import load_finetune_config

    out = out or Path("runs") / Path(recipe).stem
    config = load_finetune_config(recipe, assignments or [])
    summary = job.run(config, model, data, out, test_data=test_data, images=images)
    if as_json:
        print_json({**summary._asdict(), "checkpoint": str(summary.checkpoint)})
        return
    print_lines(*finetune_lines(summary))


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="A .safetensors file, or a folder for huggingface.")],
    layout: Annotated[
        Literal["timm", "huggingface"],
        typer.Option(help="timm: a state dict; huggingface: a folder as on the hub."),
    ] = "timm",
) -> None:
    """Write a trained ViT as a state dict that timm loads strictly, or as a Hugging Face folder.

    Example: `patchcache export run/checkpoints/step_00001000.pt --out vit.safetensors`
    """
    from trainer import export as job

    call = job.export(model, out, layout)
    print_lines(f"weights  {out}", f"load     {call}")
