"""The errors that a user can cause or mend: one clear sentence each (what, where, what to do).

Anything else that escapes is a fault of the program and keeps its traceback.
"""

from __future__ import annotations


class AnimesionError(Exception):
    """The base of every error whose message is meant for the user; exit status 1."""

    exit_code = 1


class UsageError(AnimesionError):
    """The request itself is wrong: a recipe, an option, a path; exit status 2."""

    exit_code = 2


class BusyError(AnimesionError):
    """Another build is at work in the same output folder."""


class FullDiskError(AnimesionError):
    """The disk (or a file-size limit) ran out while writing; the same command resumes."""
