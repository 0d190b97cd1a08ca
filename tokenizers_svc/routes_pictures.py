"""Pictures of token ids: decoding ids, and what is left of a picture that went through them."""

import io
import math
from typing import Annotated, Final, NamedTuple

import numpy as np
import torch
from fastapi import Query, Request, Response
from numpy.typing import NDArray
from PIL import Image

from tokenizers_svc.bodies import read_picture
from tokenizers_svc.codebook_files import not_decodable
from tokenizers_svc.decoding import make_view
from tokenizers_svc.exchange import Exchange
from tokenizers_svc.forms import NPY, array_response
from tokenizers_svc.intake import Upload, parse_view
from tokenizers_svc.observation import RequestRecord
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.queries import DetokenizeQuery, PictureForm, ReconstructQuery
from tokenizers_svc.registry import Served
from tokenizers_svc.routes_tokenize import note_outcomes, timing_headers
from tokenizers_svc.service import TokenizeService, begin
from tokenizers_svc.token_bodies import read_grids
from tokenizers_svc.tokens import Outcome, Picture

MEDIA_TYPES: Final[dict[PictureForm, str]] = {"png": "image/png", "webp": "image/webp", "npy": NPY}


class Reconstruction(NamedTuple):
    """What is left of a picture."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    psnr: float  # against the resized view, dB; infinite when nothing is lost
    outcome: Outcome


async def detokenize(request: Request, query: Annotated[DetokenizeQuery, Query()]) -> Response:
    """Return the picture that token ids stand for: every patch is the pixels of its centroid."""
    service, served = _begin(request, query.model)
    upload = Upload(request, service.limits.max_body_bytes)
    with service.admit(served, upload) as place:
        async with Exchange(request, service.limits) as exchange:
            grids = await exchange.read(read_grids(request, upload, served, service.limits))
            form = query.format or ("npy" if grids.is_batch else "png")
            if grids.is_batch and form != "npy":
                raise ProblemError(
                    "not-acceptable", "Several pictures come as one npy file: add format=npy."
                )
            place.hold_pictures(len(grids.ids))
            content = await service.in_thread(_decode, served, grids.ids, grids.is_batch, form)
    record: RequestRecord = request.state.record
    record.num_images = len(grids.ids)
    record.add_stage("read", exchange.read_s, ended=record.started + exchange.read_s)
    return _answer(content, form, timing_headers(exchange.read_s, []))


async def reconstruct(request: Request, query: Annotated[ReconstructQuery, Query()]) -> Response:
    """Return what is left of a picture whose patches are replaced by their centroids.

    X-PSNR says how near it is to the resized view, in dB.
    """
    service, served = _begin(request, query.model)
    box = parse_view(query.view)
    form = query.format or "png"
    upload = Upload(request, service.limits.max_body_bytes)
    with service.admit(served, upload):
        async with Exchange(request, service.limits) as exchange:
            picture = await exchange.read(read_picture(request, upload, service.limits, box))
            left = await exchange.work(_reconstruct(service, served, picture))
            content = await service.in_thread(_encode, left.pixels, form)
    note_outcomes(request, exchange.read_s, [left.outcome])
    headers = {
        **timing_headers(exchange.read_s, [left.outcome]),
        "X-PSNR": "inf" if math.isinf(left.psnr) else f"{left.psnr:.4f}",
    }
    return _answer(content, form, headers)


def _begin(request: Request, model: str | None) -> tuple[TokenizeService, Served]:
    service, served = begin(request, model)
    if not served.codebook.decodes_to_pixels:
        raise not_decodable(served)
    return service, served


async def _reconstruct(
    service: TokenizeService, served: Served, picture: Picture
) -> Reconstruction:
    outcome = await service.tokenize(served, picture, None)
    return await service.in_thread(_compare, service, served, picture, outcome)


def _compare(
    service: TokenizeService, served: Served, picture: Picture, outcome: Outcome
) -> Reconstruction:
    """Decode the ids of a picture and compare them with the view that they were made of."""
    rule, max_pixels = served.codebook.pixel_rule, service.limits.max_pixels
    resized = make_view(picture.data, picture.view, rule, max_pixels, service.pixels).pixels
    ids = np.frombuffer(outcome.tokens.ids, "<u2").reshape(1, *served.shape)
    pixels = _pixels(served, ids)[0]
    exact = resized.permute(1, 2, 0).numpy().astype(np.float64)
    error = float(np.square(exact - pixels).mean())
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return Reconstruction(pixels, psnr, outcome)


def _decode(
    served: Served, ids: NDArray[np.int64], is_batch: bool, form: PictureForm
) -> NDArray[np.uint8] | bytes:
    pixels = _pixels(served, ids)
    return _encode(pixels if is_batch else pixels[0], form)


def _pixels(served: Served, ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return (B, S, S, 3) of ids (B, rows, cols[, M])."""
    decoded = served.decoder.decode(torch.from_numpy(ids.astype(np.int64)))
    pixels: NDArray[np.uint8] = decoded.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def _encode(pixels: NDArray[np.uint8], form: PictureForm) -> NDArray[np.uint8] | bytes:
    if form == "npy":
        return pixels
    buffer = io.BytesIO()
    if form == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _answer(
    content: NDArray[np.uint8] | bytes, form: PictureForm, headers: dict[str, str]
) -> Response:
    if isinstance(content, bytes):
        return Response(content, headers=headers, media_type=MEDIA_TYPES[form])
    return array_response(content, "npy", headers)
