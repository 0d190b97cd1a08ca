"""Compiled kernels: their sources, how they are built, and the door to them.

The kernels are plain C functions in one shared library, built with the package where a C++ compiler
is at hand and called through ctypes, so they do not depend on the Python version. Without them
everything works, slower: `cache_builder.tokenizers.prefix` has the same algorithm in torch.
"""
