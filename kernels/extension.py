"""The one place that loads turnfast._C, the optional C++ extension.

Its absence is normal (no compiler at installation, or a torch other than the one it was built
against): callers ask `load_error()` and take their Python path. An extension that is older than
its sources, as after an update of an editable installation, is not: it is refused with a warning.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path

import torch  # noqa: F401  (the extension links against the libraries that torch loads)

from .sources import digest

# Beside this package in a checkout; a wheel has no sources, and its parts were built together.
SOURCES = Path(__file__).parent.parent / "csrc"


@functools.cache
def load_error() -> str | None:
    """None when the C++ operators are registered, otherwise why they are not."""
    try:
        module = importlib.import_module("turnfast._C")
    except (ImportError, OSError) as error:
        return str(error)
    reason = stale(getattr(module, "sources", ""), SOURCES)
    if reason:
        warnings.warn(f"turnfast: {reason}; until then slower Python", RuntimeWarning, stacklevel=2)
    return reason


def stale(built_from: str, sources: Path) -> str | None:
    """Why an extension does not fit the sources beside it; None if it does or there are none."""
    if not sources.is_dir() or built_from == digest(sources):
        return None
    return (
        "the C++ extension turnfast._C was built from other sources than csrc/ holds now; rebuild "
        "it with: pip install --no-build-isolation --no-deps -e ."
    )
