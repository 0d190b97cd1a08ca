"""patchcache: fit patch codebooks, cache per-patch discrete targets, serve them, train on them."""

__version__ = "0.1.0"
