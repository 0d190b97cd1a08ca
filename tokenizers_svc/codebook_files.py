"""The codebook of a model as files: npy, safetensors, and a picture of its centroids.

A file is made when it is first asked for and held as long as its model; npy is the centroids in
memory as they are, behind a header.
"""

import io
import math
from typing import Literal

import numpy as np
import torch
from PIL import Image

from cache_builder.files import sha256_bytes
from cache_builder.formats.codebook import Codebook
from cache_builder.imaging import unpatchify
from cache_builder.tokenizers.tokenizer import why_not_decodable
from tokenizers_svc.forms import NPY, npy_header
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.registry import CodebookFile, Served

FileKind = Literal["npy", "png", "safetensors"]

MEDIA_TYPES: dict[FileKind, str] = {
    "npy": NPY,
    "png": "image/png",
    "safetensors": "application/octet-stream",
}


def make_file(served: Served, kind: FileKind) -> CodebookFile:
    """Return a file of a model's codebook.

    Raises:
        ProblemError: 422, the centroids are not pictures.
    """
    codebook = served.codebook
    if kind == "npy":
        little = codebook.centroids.astype(codebook.centroids.dtype.newbyteorder("<"), copy=False)
        values = np.ascontiguousarray(little).data.cast("B")
        header = npy_header(little.shape, little.dtype.str)
        return CodebookFile((header, values), f'"{codebook.header.digest}-npy"')
    if kind == "png" and not codebook.has_pixel_centroids:
        raise ProblemError(
            "not-decodable",
            f"Centroids of {codebook.extractor.id} with metric {codebook.metric} are not pixels; "
            "only those of l2 codebooks of pixels are.",
        )
    content = codebook.to_bytes() if kind == "safetensors" else _atlas(codebook)
    return CodebookFile((content,), f'"{sha256_bytes(content)}"')


def not_decodable(served: Served) -> ProblemError:
    """Return the refusal to make a picture of ids."""
    return ProblemError("not-decodable", why_not_decodable(served.codebook))


def _atlas(codebook: Codebook) -> bytes:
    """Return the centroids of the first stage side by side, ceil(sqrt K) in a row, as PNG."""
    across = math.ceil(math.sqrt(codebook.vocab_size))
    down = math.ceil(codebook.vocab_size / across)
    patches = np.zeros((1, across * down, codebook.dim), np.uint8)
    # The residuals of further stages are no pictures; the first stage is, whatever its type.
    first = codebook.centroids[0].astype(np.float32)
    patches[0, : codebook.vocab_size] = first.round().clip(0, 255)
    size = codebook.pixel_rule.patch_size
    pixels = unpatchify(torch.from_numpy(patches), (down, across), size)[0]
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
