"""Everything that lies on disk. Light: numpy, pydantic and safetensors, no framework."""

from cache_builder.formats.cache import TokenCache
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, Metric, PixelRule, PluginSpec
from cache_builder.formats.manifest import CacheManifest, CacheSpec, ShardInfo
from cache_builder.formats.payloads import FeatureSpec, PayloadName, SoftSpec, restore_features
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.views import View, ViewSpec, draw_views

__all__ = [
    "CacheManifest",
    "CacheSpec",
    "CachedSample",
    "Codebook",
    "ExtractorSpec",
    "FeatureSpec",
    "Metric",
    "PayloadName",
    "PixelRule",
    "PluginSpec",
    "ShardInfo",
    "SoftSpec",
    "TokenCache",
    "View",
    "ViewSpec",
    "draw_views",
    "restore_features",
]
