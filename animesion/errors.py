"""Errors that a user can cause or fix; each message is one sentence: what is wrong, where, and what to do.

Any other exception is a fault of the program and is shown with its traceback.
"""

from __future__ import annotations


class AnimesionError(Exception):
    """The base of every error whose message is meant for the user; exit status 1."""

    exit_code = 1


class UsageError(AnimesionError):
    """The request itself is wrong: a recipe, an option, a path; exit status 2."""

    exit_code = 2


class BusyError(AnimesionError):
    """Another build uses the same output folder."""


class FullDiskError(AnimesionError):
    """The disk is full, or a quota or file-size limit is reached; the same command resumes."""
