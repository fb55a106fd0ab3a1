"""Compiles the C files of the package at installation, where there is a C compiler, and prepares the README.

Without a compiler the package is installed as pure Python: the portable code beside each C file gives the same results.
On the package index the README is shown without the repository, so its links there are absolute.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

#: What is compiled, each by itself, and what takes longer without it.
SOURCES = {
    "animesion/images/_pixels.c": "images take longer to inspect",
    "animesion/dedup/_joins.c": "copies take longer to find",
}

#: Python's stable interface: one binary for 3.11 and all that follow.
STABLE = "-DPy_LIMITED_API=0x030B0000"

MACOS = sys.platform == "darwin"
LINKED = ("-bundle", "-undefined", "dynamic_lookup") if MACOS else ("-shared",)

_IMPORT = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

name, path = sys.argv[1:]
loader = ExtensionFileLoader(name, path)
loader.exec_module(module_from_spec(spec_from_file_location(name, path, loader=loader)))
"""


class CompiledPass(BuildHookInterface[Any]):
    """Puts each compiled module next to its source, and in the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds."""
        if self.target_name != "wheel":
            return
        for name, slower in SOURCES.items():
            source = Path(self.root, name)
            module = module_of(source)
            failure = compile_module(source, module)
            if failure:
                # an earlier build may have left a module of an older source, which a checkout would go on to import;
                # pyproject.toml excludes it from the wheel even where it cannot be removed
                with contextlib.suppress(OSError):
                    module.unlink()
                self.app.display_warning(f"{name} was not compiled, so {slower}: {failure}")
                continue
            build_data["artifacts"].append(module.relative_to(self.root).as_posix())
            build_data["pure_python"] = False
            build_data["tag"] = f"cp311-abi3-{platform_tag()}"


class AbsoluteReadme(MetadataHookInterface):
    """Gives the README of the package's metadata, whose links lead to the repository at this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling for the fields that pyproject.toml lists as dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute_links(text, metadata["urls"]["Repository"], f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute_links(text: str, repository: str, revision: str) -> str:
    """Markdown whose relative links and images are addresses in a repository on GitHub."""

    def replace(found: re.Match[str]) -> str:
        # a page shows a file, `raw` is the file itself
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({repository}/{kind}/{revision}/{found['target']})"

    return re.sub(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<target>[^)\s]+)\)", replace, text)


def module_of(source: Path) -> Path:
    """The shared library that a C file is compiled to."""
    return source.with_suffix(".abi3.so")


def compile_module(source: Path, module: Path) -> str:
    """Compile the source, and replace the module once the result is known to load.

    Args:
        source: the C file.
        module: the shared library to write. A failure leaves it as it was.

    Returns:
        Why there is no new module, in one sentence; empty after success.
    """
    compiler = find_compiler()
    if not compiler:
        return "no C compiler was found"
    # a name that no other build uses: whatever has it afterwards was written by this compiler
    fresh = module.with_name(f"{source.stem}.{os.getpid()}.so")
    flags = ["-O3", "-fwrapv", "-fPIC", STABLE, *LINKED, f"-I{sysconfig.get_paths()['include']}"]
    # a fused multiplication and addition rounds once: other bits than those of the portable code
    flags += ["-ffp-contract=off", *macos_flags(), *shlex.split(os.environ.get("CFLAGS", ""))]
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": macos_target()} if MACOS else None
    failure = ""
    try:
        # not every compiler can make a function in two variants, and not every C library can load them
        for clones in (["-DANIMESION_CLONES"], []):
            fresh.unlink(missing_ok=True)
            command = [*compiler, *flags, *clones, str(source), "-o", str(fresh), "-lm"]
            failure = run_compiler(command, environment) or check_module(fresh, source.stem)
            if not failure:
                fresh.replace(module)  # a running process keeps what it has loaded
                return ""
    finally:
        fresh.unlink(missing_ok=True)
    return failure


def find_compiler() -> list[str]:
    """Command line of the C compiler: `$CC` and nothing else where it is set, else Python's own, else a usual one."""
    chosen = os.environ.get("CC", "").strip()
    names = [chosen] if chosen else [sysconfig.get_config_var("CC") or "", "cc", "gcc", "clang"]
    return next((parts for parts in map(shlex.split, names) if parts and shutil.which(parts[0])), [])


def run_compiler(command: list[str], environment: dict[str, str] | None) -> str:
    """Run a compiler; returns why it failed, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        return f"{command[0]} does not run: {error.strerror}"
    if done.returncode:
        return " ".join(done.stderr.split())[:300] or f"{command[0]} failed with status {done.returncode}"
    return ""


def check_module(module: Path, name: str) -> str:
    """Whether a compiled module of this name exists and loads in a fresh interpreter; returns why not, or nothing."""
    if not module.is_file() or not module.stat().st_size:
        return "the compiler reported success and wrote nothing"
    if is_cross_build():
        return ""
    command = [sys.executable, "-I", "-c", _IMPORT, name, str(module)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        return "the compiled module does not load within 60 s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"Python ended with status {done.returncode}"]
        return f"the compiled module does not load: {last[0][:300]}"
    return ""


def is_cross_build() -> bool:
    """Whether the module is for another kind of machine than this one, so that it cannot be loaded here."""
    if not MACOS:
        return "_PYTHON_HOST_PLATFORM" in os.environ
    kinds = macos_architectures()
    return bool(kinds) and platform.machine() not in kinds


def platform_tag() -> str:
    """Platform part of the wheel's tag; auditwheel and delocate make it more precise."""
    if not MACOS:
        return re.sub(r"[-.]", "_", sysconfig.get_platform())
    # Python's own tag is that of the interpreter, which may be universal where the module is not
    major, _, minor = macos_target().partition(".")
    kinds = sorted(macos_architectures() or [platform.machine()])
    kind = "universal2" if kinds == ["arm64", "x86_64"] else kinds[0]
    # since macOS 11 a minor version does not change the interface: tags have 0 there
    return f"macosx_{major}_{'0' if int(major) >= 11 else minor or '0'}_{kind}"


def macos_flags() -> list[str]:
    """Compiler flags of `$ARCHFLAGS`, which says for which machines to build; none elsewhere than on macOS."""
    return shlex.split(os.environ.get("ARCHFLAGS", "")) if MACOS else []


def macos_architectures() -> set[str]:
    """Architectures that `$ARCHFLAGS` names; empty for that of this machine."""
    return {kind for flag, kind in zip(macos_flags(), macos_flags()[1:], strict=False) if flag == "-arch"}


def macos_target() -> str:
    """Oldest macOS that the module is for: `$MACOSX_DEPLOYMENT_TARGET`, else that of Python itself."""
    target = os.environ.get("MACOSX_DEPLOYMENT_TARGET") or sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET")
    kinds = macos_architectures() or {platform.machine()}
    oldest = "11.0" if kinds == {"arm64"} else "10.13"
    return max(str(target or oldest), oldest, key=lambda version: [int(part) for part in version.split(".")])
