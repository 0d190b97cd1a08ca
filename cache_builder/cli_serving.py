"""The command that serves: what it takes, in groups, and how that becomes options of a service."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from cache_builder.cli_options import Device, RayAddress, Weights, refuse_given
from cache_builder.errors import ConfigError

_FOR_RAY = ("replicas", "min_replicas", "max_replicas", "gpus_per_replica", "cpus_per_replica")

_LISTENING, _KEYS, _LIMITS = "Address", "Access", "Limits"
_LOGS, _RAY = "Logs, metrics and traces", "Ray Serve"


def serve(
    context: typer.Context,
    codebook: Annotated[
        list[str],
        typer.Option(
            help="What `patchcache fit` wrote, PATH or NAME=PATH. May be given many times; the "
            "first is the default model. One feature model serves all that share it."
        ),
    ],
    device: Device = "auto",
    weights: Weights = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at.", rich_help_panel=_LISTENING)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_LISTENING)
    ] = 8000,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="A page at /.", rich_help_panel=_LISTENING)
    ] = True,
    docs: Annotated[
        bool,
        typer.Option(
            "--docs/--no-docs", help="/docs and /openapi.json.", rich_help_panel=_LISTENING
        ),
    ] = True,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="API keys, one a line, or their SHA-256 as sha256:DIGEST; without it everybody "
            "may ask. Read again on SIGHUP.",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Keys that also open /v1/admin/; without it nobody may reload a model by HTTP.",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Listen at --host without keys although others can reach it.",
            rich_help_panel=_KEYS,
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose web pages may ask, https://example.org. May be given many times.",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    open_metrics: Annotated[
        bool,
        typer.Option("--open-metrics", help="/metrics wants no key.", rich_help_panel=_KEYS),
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, such as max_batch=16 or drain_s=5; docs/service-operations.md has "
            "the names and defaults. May be given many times.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    log_format: Annotated[
        Literal["auto", "text", "json"],
        typer.Option(help="auto is text on a terminal and JSON in a pipe.", rich_help_panel=_LOGS),
    ] = "auto",
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            rich_help_panel=_LOGS,
            help="Answer /metrics at this port of 127.0.0.1 too, without a key.",
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send traces to this OpenTelemetry collector, http://HOST:4318; default what "
            "OTEL_EXPORTER_OTLP_ENDPOINT says, or none.",
            rich_help_panel=_LOGS,
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve replicas on Ray.", rich_help_panel=_RAY)
    ] = False,
    ray_address: RayAddress = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="How many there are; default 1.", rich_help_panel=_RAY)
    ] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="In place of --replicas: Ray keeps at least so many, and adds more while there "
            "is work for them, ...",
            rich_help_panel=_RAY,
        ),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="... up to so many.", rich_help_panel=_RAY)
    ] = None,
    gpus_per_replica: Annotated[
        float, typer.Option(min=0, help="With 0.25 four share a GPU.", rich_help_panel=_RAY)
    ] = 0,
    cpus_per_replica: Annotated[
        float, typer.Option(min=0, help="CPU cores of each.", rich_help_panel=_RAY)
    ] = 1,
) -> None:
    """Tokenise images over HTTP.

    Example: `patchcache serve --codebook codebook.safetensors --port 8000`
    """
    from tokenizers_svc import logs
    from tokenizers_svc.access import AccessOptions
    from tokenizers_svc.options import ServiceOptions, name_codebooks, read_limits

    logs.configure(log_format, level=logging.getLogger().level)
    options = ServiceOptions(
        codebooks=name_codebooks(codebook),
        device=device,
        weights=weights,
        limits=read_limits(limit or []),
        access=AccessOptions(
            key_file=key_file,
            admin_key_file=admin_key_file,
            cors_origins=tuple(cors_origin or ()),
            open_metrics=open_metrics,
        ),
        page=page,
        docs=docs,
    )
    if not ray:
        refuse_given(context, _FOR_RAY, "has no meaning without --ray")
        from tokenizers_svc import serve as service

        service.run(
            options=options,
            host=host,
            port=port,
            insecure=insecure,
            metrics_port=metrics_port,
            otlp_endpoint=otlp_endpoint,
        )
        return
    refuse_given(context, ("metrics_port", "otlp_endpoint"), "is not for replicas on Ray")
    from tokenizers_svc import ray_serve

    if (min_replicas is None) != (max_replicas is None):
        raise ConfigError("--min-replicas and --max-replicas go together: pass both.")
    if replicas is not None and max_replicas is not None:
        raise ConfigError("Pass either --replicas or --min-replicas and --max-replicas.")
    ray_serve.run(
        options,
        ray_serve.ReplicaOptions(
            address=ray_address,
            num_replicas=min_replicas or replicas or 1,
            max_replicas=max_replicas,
            gpus_per_replica=gpus_per_replica,
            cpus_per_replica=cpus_per_replica,
        ),
        host=host,
        port=port,
        insecure=insecure,
    )
