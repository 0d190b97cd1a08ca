"""What happens when patchcache is installed from its sources: the kernels are compiled.

Without a C++ compiler the package is installed without them, and everything works, slower.
"""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = "cache_builder/tokenizers/kernels"


class CompileKernels(BuildHookInterface):
    """Compile the kernels into the wheel, or beside their sources for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library before the files of the wheel are collected."""
        if self.target_name != "wheel":
            return
        script = runpy.run_path(str(Path(self.root) / _KERNELS / "build.py"))
        try:
            library = script["build"]()
        except script["BuildError"] as exc:
            self.app.display_warning(f"The kernels were not built: {exc}")
            return
        # One library for every Python version: it is called through ctypes.
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(f"{_KERNELS}/{library.name}")
