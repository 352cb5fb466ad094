"""Run Python that nobody has read, in a sandbox: bubblewrap, or not at all.

The process sees a read-only system, an empty home in memory, no network, no other process and no
environment variable of ours; memory, processor time, wall time, file size, output and the number
of processes are limited. What it started dies with it. Bubblewrap (`bwrap`) needs Linux with user
namespaces, or root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .sandbox_init import TOO_MANY

MAX_CODE_BYTES = 100_000
MAX_HOME_BYTES = 64 << 20
UNSAFE = "I understand that this runs code from a model without a sandbox"

_FIRST_USER = 1 << 30  # from here on no system gives out users
# no namespace of users: its root would be the machine's, whose processes nothing limits
_ROOTS_NAMESPACES = (
    *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
    *("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
)


class SandboxError(RuntimeError):
    """There is no sandbox; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one run.

    Attributes:
        wall_s: time on the clock. cpu_s: processor time of each process, in whole seconds.
        memory_bytes: address space of each process. disk_bytes: each file.
        output_chars: what is kept of stdout and stderr together.
        processes: processes and threads at a time, looked at every 20 ms; in a sandbox only.
    """

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_chars: int = 8192
    processes: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a program ended: its exit code (negative, or above 128 in a sandbox: the signal), its
    output, and whether time was up or it had more processes than allowed."""

    code: int
    output: str
    timed_out: bool = False
    too_many: bool = False


@functools.cache
def sandbox_fault() -> str:
    """ "" where programs can be run in a sandbox, else why they cannot."""
    if not sys.platform.startswith("linux"):
        return f"bubblewrap needs Linux, this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "bwrap is not installed (the package is called bubblewrap)"
    return "" if _as_root() else _try(by_root=False)


def require_sandbox(unsafe_without_sandbox: str = "") -> bool:
    """Whether to use a sandbox; False only where there is none and the words say so.

    Raises:
        SandboxError: there is none, and the words do not say so.
    """
    fault = sandbox_fault()
    if not fault:
        return True
    if unsafe_without_sandbox == UNSAFE:
        return False
    raise SandboxError(
        f"no sandbox for the code that a model writes: {fault}. Install bubblewrap, or, on a "
        f'machine that may be lost, set unsafe_without_sandbox = "{UNSAFE}"'
    )


def run_python(code: str, *, limits: Limits, sandboxed: bool = True) -> Finished:
    """Run a program in a process of its own and collect what it prints.

    Args:
        sandboxed: False runs it with the limits alone, in a folder of its own.
    """
    if len(code.encode()) > MAX_CODE_BYTES:
        raise ValueError(f"the program has more than {MAX_CODE_BYTES} bytes")
    # without site-packages: what a model may import is the standard library
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c"]
    sandbox = _sandboxed(python, limits.processes, by_root=_as_root()) if sandboxed else ()
    with tempfile.TemporaryDirectory(prefix="turnfast-") as folder, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [*_limited(limits), *sandbox, *python, code],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(limits.wall_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill(process)
        size_bytes = os.fstat(out.fileno()).st_size
        out.seek(0)
        text = out.read(4 * limits.output_chars).decode("utf-8", errors="replace")
    if len(text) > limits.output_chars or size_bytes > 4 * limits.output_chars:
        text = text[: limits.output_chars] + "\n[output cut]"
    many = sandboxed and process.returncode == TOO_MANY
    return Finished(code=process.returncode, output=text, timed_out=timed_out, too_many=many)


@functools.cache
def _as_root() -> bool:
    """Whether root's own rights will do; else, as for any user, namespaces of users."""
    return os.geteuid() == 0 and not _try(by_root=True)


def _try(*, by_root: bool) -> str:
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c"]
    try:
        tried = subprocess.run(
            [*_sandboxed(python, 8, by_root=by_root), *python, "print(7)"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap cannot be run: {error}"
    if tried.returncode or tried.stdout != "7\n":
        return f"bwrap does not work here: {tried.stderr.strip()[:200] or tried.returncode}"
    return ""


def _sandboxed(python: Sequence[str], processes: int, *, by_root: bool) -> Sequence[str]:
    """A command line up to the program, which process 1 of the sandbox starts."""
    init = Path(__file__).with_name("sandbox_init.py").read_text(encoding="utf-8")
    user = _FIRST_USER + secrets.randbelow(_FIRST_USER) if by_root else -1
    return [*_wrapped(by_root), *python, init, str(processes), str(user)]


def _wrapped(by_root: bool) -> Sequence[str]:
    """bwrap's command line up to process 1."""
    system = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
    shown = dict.fromkeys([*(path for path in system if os.path.exists(path)), sys.base_prefix])
    # bubblewrap makes the folders above a bound one for its own user alone
    above = dict.fromkeys(str(p) for path in shown for p in reversed(Path(path).parents[:-1]))
    return [
        "bwrap",
        *(word for path in above for word in ("--perms", "0755", "--dir", path)),
        *(word for path in shown for word in ("--ro-bind", path, path)),
        *("--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp"),
        *("--perms", "1777", "--size", str(MAX_HOME_BYTES), "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--die-with-parent", "--new-session", "--as-pid-1"),
        *(_ROOTS_NAMESPACES if by_root else ("--unshare-all", "--cap-drop", "ALL")),
        *("--hostname", "sandbox", "--"),
    ]


def _limited(limits: Limits) -> Sequence[str]:
    """A command line that sets limits and then becomes the program; ulimit counts memory in KiB
    and files in blocks of 512 bytes."""
    script = 'ulimit -t "$1" && ulimit -v "$2" && ulimit -f "$3" && shift 3 && exec "$@"'
    numbers = (limits.cpu_s, limits.memory_bytes >> 10, limits.disk_bytes >> 9)
    return ["/bin/sh", "-c", script, "limited", *map(str, numbers)]


def _kill(process: subprocess.Popen) -> None:
    """The whole group; in a sandbox everything inside dies with the first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
