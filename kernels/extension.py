"""The one place that loads turnfast._C, the optional C++ extension.

Its absence is normal (no compiler at installation, or a torch other than the one it was built
against): callers ask `load_error()` and take their Python path.
"""

from __future__ import annotations

import functools
import importlib

import torch  # noqa: F401  (the extension links against the libraries that torch loads)


@functools.cache
def load_error() -> str | None:
    """None when the C++ operators are registered, otherwise why they are not."""
    try:
        importlib.import_module("turnfast._C")
    except (ImportError, OSError) as error:
        return str(error)
    return None
