"""The README.md of what is sent to a Hub: the facts, and how to use it.

A card of ours says so in a comment; one without it was written by somebody and is left alone.
"""

from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import CacheManifest
from cache_builder.measures import size_text

CARD_NAME = "README.md"

_MARK = "<!-- written by `patchcache push`; without this line it is left as it is -->"


def is_ours(card: bytes) -> bool:
    """Say whether a card was written by `push`."""
    return _MARK.encode() in card


def cache_card(manifest: CacheManifest, place: str, options: str) -> str:
    """Return the card of a cache; `options` are what `pull` takes besides the place."""
    spec = manifest.spec
    rows, cols = spec.grid
    stages = f", {spec.num_stages} per patch" if spec.num_stages > 1 else ""
    facts = {
        "images": f"{manifest.num_samples:,}, and {manifest.num_skipped:,} skipped",
        "views per image": f"{spec.view_spec.num_views} of {spec.view_spec.size} pixels",
        "token ids per view": f"{rows} x {cols}{stages}, each below {spec.vocab_size:,}",
        "payloads": ", ".join(manifest.payloads),
        "images in the cache": spec.images_in_cache,
        "layout": spec.layout,
        "size": f"{size_text(manifest.bytes)} in {len(manifest.shards):,} shards",
        "fingerprint of the tokenizer": f"`{manifest.fingerprint}`",
    }
    if others := [name for name in manifest.tokenizers if name != manifest.fingerprint]:
        facts["further tokenizers"] = ", ".join(f"`{name}`" for name in others)
    return _card(f"Token cache {place}", facts, f"{place}{options}", "cache/")


def codebook_card(codebook: Codebook, place: str, options: str) -> str:
    """Return the card of a codebook; `options` are what `pull` takes besides the place."""
    rule = codebook.pixel_rule
    stages = f"{codebook.num_stages} stages of " if codebook.num_stages > 1 else ""
    facts = {"token ids": f"{stages}{codebook.vocab_size:,}, without centroids"}
    if codebook.has_centroids:
        facts = {
            "centroids": f"{stages}{codebook.vocab_size:,} of {codebook.dim:,} values, "
            f"{codebook.centroids.dtype}",
            "metric": codebook.metric,
        }
    facts["features"] = codebook.extractor.id
    facts["views"] = f"{rule.size} pixels, patches of {rule.patch_size}"
    if codebook.is_fitted:
        header = codebook.header
        facts["fitted to"] = f"{header.num_points:,} patches of {header.num_images:,} images"
    facts["fingerprint of the tokenizer"] = f"`{codebook.fingerprint}`"
    name = place.rpartition("/")[2]
    return _card(f"Codebook {place}", facts, f"{place}{options}", name)


def _card(title: str, facts: dict[str, str], pulled: str, out: str) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\ntags:\n- patchcache\n---\n{_MARK}\n\n# {title}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"```\npip install 'patchcache[hub]'\npatchcache pull {pulled} --out {out}\n```\n"
    )
