"""Load turnfast._C, the optional C++ extension.

A missing extension is normal: no compiler at installation, or another torch than at the build.
Callers check `load_error()` and use their Python path. An extension that does not match its
sources, for example after an update of an editable installation, is rejected with a warning.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path

import torch  # noqa: F401  (the extension links against the libraries that torch loads)

from .sources import digest

# Exists in a checkout only. A wheel has no sources, and its extension always matches.
SOURCES = Path(__file__).parent.parent / "csrc"


@functools.cache
def load_error() -> str | None:
    """Return None if the C++ operators are registered, otherwise the reason why not."""
    try:
        module = importlib.import_module("turnfast._C")
    except (ImportError, OSError) as error:
        return str(error)
    reason = stale(getattr(module, "sources", ""), SOURCES)
    if reason:
        warnings.warn(
            f"turnfast: {reason}; until then the slower Python code runs",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def stale(built_from: str, sources: Path) -> str | None:
    """Return why an extension does not match its sources; None if it does or there are none."""
    if not sources.is_dir() or built_from == digest(sources):
        return None
    return (
        "the C++ extension turnfast._C was built from other sources than those in csrc/; rebuild "
        "it with: pip install --no-build-isolation --no-deps -e ."
    )
