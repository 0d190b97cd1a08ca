"""Python's garbage collector in a process that serves.

What was loaded, half a million objects of torch and its company, lives as long as the process. A
full collection walks through all of them, a quarter of a second during which nobody is answered,
and comes every few hundred pictures.
"""

import gc


def spare_what_is_loaded() -> None:
    """Keep the collector away from everything that is alive now; for when all models are warm."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
