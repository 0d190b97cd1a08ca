"""Pixels to token ids."""

from cache_builder.tokenizers.quantizer import CentroidIndex, nearest_centroid
from cache_builder.tokenizers.tokenizer import PatchTokenizer

__all__ = ["CentroidIndex", "PatchTokenizer", "nearest_centroid"]
