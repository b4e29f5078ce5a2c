"""Errors of running an exported directory."""

from __future__ import annotations


class BundleError(Exception):
    """An exported directory cannot be read or run as asked."""


class Cancelled(Exception):
    """A call was ended early by `cancel`."""
