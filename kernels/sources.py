"""The hash of the C++ sources that the extension is built from.

Standard library only: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Return a hash of the names and contents of the C++ files of a folder."""
    total = hashlib.sha256()
    for path in sorted([*folder.rglob("*.cpp"), *folder.rglob("*.h")]):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
