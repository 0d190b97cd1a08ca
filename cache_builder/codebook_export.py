"""`patchcache export-codebook`: the centroids for other programs, as numpy arrays or a faiss index.

The only `import faiss` of the project. Beside the file lies a JSON of the same name with everything
that the codebook's header says, so that whoever uses the centroids knows which pixels or features
they are compared with.

    .npy    (M, K, D) in the codebook's own type
    .faiss  one stage: a flat index, by L2, or by inner product where the metric is cosine and
            features have unit length; more stages: a residual quantiser with a beam of one

A faiss index computes in float32. Its ids are ours but where the distances of two centroids differ
by less than float32 can tell.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_builder import files
from cache_builder.errors import ConfigError, MissingDependencyError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.sample import npy_bytes


class ExportedCodebook(NamedTuple):
    """What was written."""

    file: Path
    description: Path
    call: str  # the Python expression that loads the file


def export_codebook(codebook: str | Path, out: Path) -> ExportedCodebook:
    """Write the centroids of a codebook, and beside them what its header says.

    Args:
        codebook: Where it lies.
        out: A file that ends in .npy or .faiss; replaced if it exists.

    Raises:
        ArtifactError: The codebook is damaged.
        ConfigError: `out` has another name, or the codebook does not fit faiss.
        MissingDependencyError: faiss is not installed.
    """
    if out.suffix not in (".npy", ".faiss"):
        raise ConfigError(f"--out {out} must end in .npy or .faiss, which says what is written.")
    opened = Codebook.load(codebook)
    opened.require_centroids("An export")
    if out.suffix == ".npy":
        content, call = npy_bytes(opened.centroids), f"numpy.load({str(out)!r})"
    else:
        content, call = _index_bytes(opened), f"faiss.read_index({str(out)!r})"
    description = out.with_suffix(".json")
    header = opened.header.model_dump(mode="json")
    files.publish(description, files.canonical_json(header) + b"\n")
    files.publish(out, content)
    return ExportedCodebook(out, description, call)


def _index_bytes(codebook: Codebook) -> bytes:
    try:
        import faiss
    except ModuleNotFoundError as exc:
        raise MissingDependencyError(
            "A .faiss index needs faiss, which is not installed. Run: pip install faiss-cpu"
        ) from exc
    centroids = codebook.centroids.astype(np.float32)
    index = (
        _flat(faiss, codebook, centroids) if len(centroids) == 1 else _residual(faiss, centroids)
    )
    serialised: bytes = faiss.serialize_index(index).tobytes()
    return serialised


def _flat(faiss: Any, codebook: Codebook, centroids: np.ndarray) -> Any:
    make = faiss.IndexFlatIP if codebook.metric == "cosine" else faiss.IndexFlatL2
    index = make(codebook.dim)
    index.add(centroids[0])
    return index


def _residual(faiss: Any, centroids: np.ndarray) -> Any:
    num_stages, vocab_size, dim = centroids.shape
    num_bits = vocab_size.bit_length() - 1
    if vocab_size != 1 << num_bits or not num_bits:
        raise ConfigError(
            f"A residual quantiser of faiss has a power of two of centroids per stage, not "
            f"{vocab_size:,}. Write a .npy."
        )
    index = faiss.IndexResidualQuantizer(dim, num_stages, num_bits)
    quantizer = index.rq
    faiss.copy_array_to_vector(centroids.ravel(), quantizer.codebooks)
    quantizer.max_beam_size = 1  # greedy, as ours
    quantizer.is_trained = index.is_trained = True
    return index
