"""What was measured on this machine before: a small JSON file, read once, never required.

The file is $XDG_CACHE_HOME/turnfast/kernels.json (~/.cache by default). Keys name the GPU, the
versions of torch and triton and a hash of the kernels' sources, so nothing stale is ever recalled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import torch

_known: dict[str, str] = {}


def recall(key: str) -> str | None:
    """What was remembered under the key, or None."""
    if not _known:
        _known.update(_read())
    return _known.get(key)


def remember(key: str, value: str, *, lasting: bool = True) -> None:
    """Keep a value for this process and, if lasting and the cache can be written, for the next."""
    _known[key] = value
    if not lasting:
        return
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have added keys; the replacement is atomic.
        text = json.dumps(_read() | {key: value}, indent=1, sort_keys=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(path)
    except OSError:
        return


def device_key(device: torch.device) -> str:
    """GPU, versions and sources, as one key."""
    import triton

    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return f"{name}/torch{torch.__version__}/triton{triton.__version__}/{_source_hash()}"


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "turnfast" / "kernels.json"


def _read() -> dict[str, str]:
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)}
