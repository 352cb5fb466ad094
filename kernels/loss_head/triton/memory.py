"""What was measured on this machine before: a small file per answer, never required.

The files are in $XDG_CACHE_HOME/turnfast/kernels (~/.cache by default). A key names the GPU, its
driver, the versions of torch and triton and a hash of the kernels' sources, so nothing stale is
ever recalled. One file per key, replaced in one step: processes that write at once lose nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from pathlib import Path

import torch

KERNELS = Path(__file__).parents[2]
# Its presence, and which version, where NVIDIA's kernel module is loaded.
DRIVER = Path("/proc/driver/nvidia/version")


def recall(key: str) -> str | None:
    """What was remembered under the key; None if nothing was, or nothing readable."""
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        return _path(key).read_text("utf-8")
    return None


def remember(key: str, value: str) -> None:
    """Keep a value for the processes to come, if the cache can be written."""
    part = None
    # RuntimeError: a user without a home.
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(value)
        os.replace(part, path)
        return
    if part is not None:
        with contextlib.suppress(OSError):
            os.unlink(part)


def device_key(device: torch.device) -> str:
    """GPU, driver, versions and sources, as one key."""
    import triton

    return f"{hardware(device)}/torch{torch.__version__}/triton{triton.__version__}/{sources()}"


def hardware(device: torch.device) -> str:
    """The GPU's name and its driver; other devices, for the interpreter, by their type."""
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)}/driver-{driver()}"


def driver() -> str:
    """The version of the GPU's driver; "unknown" where the system does not show it."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text("utf-8", "replace"))
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


@functools.cache
def sources() -> str:
    """A hash of all kernels, and of what launches them."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.relative_to(KERNELS).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _path(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # A key's parts are folders; what a name must not hold, as spaces, becomes a dash.
    parts = [re.sub(r"[^\w.+-]|^\.+", "-", part) for part in key.split("/")]
    return Path(base, "turnfast", "kernels", *parts)
