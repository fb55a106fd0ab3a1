"""Compiles `animesion/images/_pixels.c` at installation, where there is a C compiler.

Without one the package is installed all the same: `animesion.images.features` then takes the portable way.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, MODULE = "animesion/images/_pixels.c", "animesion/images/_pixels.abi3.so"

#: Python's stable interface: one binary for 3.11 and all that follow.
STABLE = "-DPy_LIMITED_API=0x030B0000"

LINKED = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)


class CompiledPass(BuildHookInterface):
    """Puts the compiled module beside its source, and in the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        failure = compiled(root / SOURCE, root / MODULE)
        if failure:
            with contextlib.suppress(OSError):
                (root / MODULE).unlink()  # of an earlier source, maybe
            self.app.display_warning(f"{SOURCE} was not compiled, so images take longer to inspect: {failure}")
            return
        build_data["artifacts"].append(MODULE)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}"


def compiled(source: Path, module: Path) -> str:
    """Compile; returns why not, or nothing."""
    compilers = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    found = [parts for parts in (shlex.split(each or "") for each in compilers) if parts and shutil.which(parts[0])]
    if not found:
        return "no C compiler was found"
    fresh = module.with_suffix(".new")
    flags = ["-O3", "-fwrapv", "-fPIC", STABLE, *LINKED, f"-I{sysconfig.get_paths()['include']}"]
    # not every compiler can make a function in two variants
    for clones in (["-DANIMESION_CLONES"], []):
        command = [*found[0], *flags, *clones, *shlex.split(os.environ.get("CFLAGS", ""))]
        done = subprocess.run([*command, str(source), "-o", str(fresh), "-lm"], capture_output=True, text=True)
        if done.returncode == 0:
            fresh.replace(module)  # a running process keeps what it has loaded
            return ""
    fresh.unlink(missing_ok=True)
    return " ".join(done.stderr.split())[:300]
