"""The models that answer here, and their codebooks as files."""

from typing import Annotated

from fastapi import Query, Request, Response

from tokenizers_svc.codebook_files import MEDIA_TYPES, FileKind, make_file
from tokenizers_svc.conditional import content_response
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.queries import FileQuery, NoQuery, read_query
from tokenizers_svc.registry import Served
from tokenizers_svc.schemas import ModelInfo, ModelList, ReloadAnswer
from tokenizers_svc.service import TokenizeService, begin

_A_YEAR_S = 31_536_000


async def list_models(request: Request) -> ModelList:
    """Return the models that answer here, the default one first, and the limits."""
    service: TokenizeService = request.app.state.service
    read_query(request, NoQuery)
    return ModelList(models=[describe(served, service) for served in service.registry])


async def show_model(request: Request, model: str) -> ModelInfo:
    """Return one model, and the limits."""
    service, served = begin(request, model)
    read_query(request, NoQuery)
    return describe(served, service)


async def get_npy(request: Request, model: str, query: Annotated[FileQuery, Query()]) -> Response:
    """Return the centroids (M, K, D), as numpy.save writes them."""
    return await _get_file(request, model, "npy", query.digest)


async def get_png(request: Request, model: str, query: Annotated[FileQuery, Query()]) -> Response:
    """Return the pixels of the centroids side by side, ceil(sqrt K) in a row."""
    return await _get_file(request, model, "png", query.digest)


async def get_safetensors(
    request: Request, model: str, query: Annotated[FileQuery, Query()]
) -> Response:
    """Return the whole codebook, as `patchcache fit` writes it."""
    return await _get_file(request, model, "safetensors", query.digest)


async def reload_model(request: Request, model: str) -> ReloadAnswer:
    """Load a model from its file again, and let it answer when it is ready.

    Until then the old one serves, and so it does when the new one cannot be loaded.
    """
    service, _ = begin(request, model)
    read_query(request, NoQuery)
    if service.is_draining:
        raise ProblemError(
            "draining", "The service is shutting down.", headers={"Retry-After": "1"}
        )
    done = await service.reloader.reload(model)
    request.state.fingerprint = done.fresh.fingerprint
    return ReloadAnswer(
        model=model,
        fingerprint=done.fresh.fingerprint,
        previous_fingerprint=done.old.fingerprint,
        seconds=round(done.seconds, 3),
    )


def describe(served: Served, service: TokenizeService) -> ModelInfo:
    """Return what a client may want to know of a model before it asks."""
    codebook = served.codebook
    rule = codebook.pixel_rule
    return ModelInfo(
        id=served.name,
        fingerprint=served.fingerprint,
        vocab_size=codebook.vocab_size,
        num_stages=codebook.num_stages,
        grid=rule.grid,
        image_size=rule.size,
        patch_size=rule.patch_size,
        interpolation=rule.interpolation,
        metric=codebook.metric,
        extractor=codebook.extractor.id,
        dtype=str(codebook.centroids.dtype),
        digest=codebook.header.digest,
        decodes_to_pixels=served.codebook.decodes_to_pixels,
        device=str(served.device),
        limits=service.limits,
    )


async def _get_file(request: Request, model: str, kind: FileKind, digest: str | None) -> Response:
    service, served = begin(request, model)
    if digest is not None and digest != served.codebook.header.digest:
        raise ProblemError(
            "not-found", "The codebook of this model has another digest; /v1/models has it."
        )
    file = served.files.get(kind)
    if file is None:
        file = await service.in_thread(make_file, served, kind)
        served.files[kind] = file
    lifetime = "no-cache" if digest is None else f"public, max-age={_A_YEAR_S}, immutable"
    return content_response(
        request,
        file.parts,
        etag=file.etag,
        media_type=MEDIA_TYPES[kind],
        headers={"Cache-Control": lifetime},
    )
