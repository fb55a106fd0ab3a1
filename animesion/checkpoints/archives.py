"""Weight files as Python values: safetensors, PyTorch archives and NumPy archives, recognised by their first bytes.

A PyTorch archive is a pickle. It is read with `weights_only`, and whatever else it names is replaced by a stand-in that
is empty and runs nothing: trainers store their settings, paths and meters beside the weights. A pickle that names
something only an attack has a use for is refused.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from animesion.errors import UsageError

#: Usual ends of names, for messages alone.
_KINDS = {".safetensors": "safetensors file", ".npz": "NumPy archive"}
_KINDS |= dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), "PyTorch archive")

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LARGEST_HEADER = 64 << 20  # bytes, of a safetensors header
_LARGEST_PICKLE = 256 << 20  # bytes, of the pickle in a PyTorch archive, which has no weights in it
_LARGEST_RATIO = 20  # of the arrays in a NumPy archive to its file
_PICKLES_OF_OLD_FORMAT = 5  # magic number, version, machine, content, names of the storages

#: Modules that no weight file needs: their functions run code, or open files and connections.
_REFUSED = {
    "_io",
    "_pickle",
    "asyncio",
    "ctypes",
    "ftplib",
    "http",
    "importlib",
    "io",
    "marshal",
    "multiprocessing",
    "nt",
    "os",
    "pickle",
    "pip",
    "posix",
    "pty",
    "runpy",
    "shutil",
    "smtplib",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "timeit",
    "urllib",
    "webbrowser",
}
_REFUSED_BUILTINS = {
    "__import__",
    "breakpoint",
    "compile",
    "delattr",
    "eval",
    "exec",
    "exit",
    "input",
    "open",
    "quit",
    "setattr",
}


class _Ignored:
    """Stands in for a class or function: calling it gives an empty mapping, which keeps the state of an object."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


class _Opaque:
    """Stands in for a class whose state is no mapping, such as an array: the state is dropped."""

    def __init__(self, *args: object) -> None:
        self.code = args[0] if args and isinstance(args[0], str) else ""

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


def _number(kind: object = None, data: object = None, *rest: object) -> float | None:
    """Stands in for the function that makes a NumPy scalar, such as an accuracy, from its type and bytes."""
    if isinstance(kind, _Opaque) and kind.code in {"f8", "f4", "f2", "i8", "i4"} and isinstance(data, bytes):
        return float(np.frombuffer(data, f"<{kind.code}")[0]) if len(data) == int(kind.code[1]) else None
    return None


def _items(items: object = (), *rest: object) -> list[Any]:
    """Stands in for `collections.deque`."""
    return list(items) if isinstance(items, list | tuple) else []


def read_archive(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a weight file.

    Args:
        path: the file; its name does not matter.

    Returns:
        Its content, and the metadata of a safetensors file. The content of a safetensors or NumPy archive is a mapping
        from names to tensors; that of a PyTorch archive is what was saved.

    Raises:
        UsageError: the file cannot be read, is damaged, has another format, or contains code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
            size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot read the weight file {path}: {error.strerror or error}") from error
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` where it is from")
    # first, because the length of a header can begin like a pickle
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= min(size - 8, _LARGEST_HEADER):
        return _read_safetensors(path)
    if start.startswith(_ZIP):
        return _read_zip(path), {}
    if start.startswith(_PICKLE):
        return _read_pickled(path), {}
    kind = _KINDS.get(path.suffix)
    raise UsageError(
        f"{path} is not an intact {kind}"
        if kind
        else f"{path} is neither a safetensors file, nor an archive of PyTorch or NumPy"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), dict(metadata)
    except Exception as error:  # damaged bytes fail in any way, here and below
        raise UsageError(f"{path} is not an intact safetensors file: {error}") from error


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:
        raise UsageError(f"{path} is not an intact PyTorch archive ({type(error).__name__})") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise UsageError(f"{path} is a TorchScript program, which is not read: save the state dict of its network")
    return _read_numpy(path) if any(name.endswith(".npy") for name in names) else _read_pickled(path)


# -- PyTorch ---------------------------------------------------------------------------------------------------------


def _read_pickled(path: Path) -> Any:
    try:
        named = _names(path)
    except Exception as error:
        raise UsageError(f"{path} is not an intact PyTorch archive ({type(error).__name__})") from error
    for module, name in sorted(named):
        if module.partition(".")[0] in _REFUSED or (module == "builtins" and name in _REFUSED_BUILTINS):
            raise UsageError(
                f"{path} contains {module}.{name}, which could run code and which weights do not need: it was not run, "
                "and the file is not read; get the weights from another source"
            )
    try:
        with torch.serialization.safe_globals([_stand_in(module, name) for module, name in named]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} contains Python objects besides tensors, which could run code when read: convert it to "
            "safetensors if you trust it"
        ) from error
    except Exception as error:
        raise UsageError(f"{path} is not an intact PyTorch archive ({type(error).__name__})") from error


def _names(path: Path) -> set[tuple[str, str]]:
    """Module and name of everything that the pickles of an archive name and `weights_only` does not know."""
    found: set[tuple[str, str]] = set()
    for data in _pickles(path):
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
                found.add((module, name))
    # torch finds its own names first, and refuses the functions at its top that it does not know
    return {each for each in found if each[0] != "torch"}


def _pickles(path: Path) -> Iterator[bytes | BinaryIO]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("/data.pkl") or entry.filename == "data.pkl":
                    if entry.file_size > _LARGEST_PICKLE:
                        raise ValueError("the pickle is too large")
                    yield archive.read(entry)
        return
    with path.open("rb") as file:
        for _ in range(_PICKLES_OF_OLD_FORMAT):
            yield file  # reading stops behind each pickle


def _stand_in(module: str, name: str) -> tuple[Any, str]:
    full = f"{module}.{name}"
    if full == "argparse.Namespace":
        return argparse.Namespace, full
    if module.partition(".")[0] == "numpy":
        return (_number if name == "scalar" else _Opaque), full
    return (_items if full == "collections.deque" else _Ignored), full


# -- NumPy -----------------------------------------------------------------------------------------------------------


def _read_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_arrays(archive, path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except Exception as error:
        raise UsageError(f"{path} is not an intact NumPy archive of numbers ({type(error).__name__})") from error


def _check_arrays(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise `ValueError` if an array is larger than its data, or all of them are far larger than the file."""
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > _LARGEST_RATIO * path.stat().st_size + (1 << 20):
        raise ValueError("the arrays are far larger than the file")
    for entry in entries:
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if dtype.hasobject or int(np.prod(shape, dtype=object)) * dtype.itemsize > entry.file_size:
                raise ValueError("an array is larger than its data")
