"""How a long job says how far it is: it is given a function to call, and prints nothing itself."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how many images, units or files are done, and with the number of all."""
