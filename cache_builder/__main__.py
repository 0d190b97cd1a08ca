"""`python -m cache_builder` is `patchcache`, for launchers such as torchrun that take a module."""

from cache_builder.cli import main

if __name__ == "__main__":
    main()
