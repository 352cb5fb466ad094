"""Run untrusted Python code in a bubblewrap sandbox.

The program sees a read-only system and an empty home directory in memory. It has no network, sees
no other process and none of the parent's environment variables. Memory, CPU time, wall time, file
size, output and the number of processes are limited. Its child processes are killed when it ends.
Bubblewrap (`bwrap`) needs Linux with user namespaces, or root.
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

from .sandbox_init import TOO_MANY_PROCESSES

MAX_CODE_BYTES = 100_000
MAX_HOME_BYTES = 64 << 20
UNSAFE = "I understand that this runs code from a model without a sandbox"

_FIRST_USER_ID = 1 << 30  # systems assign lower user ids only
# Isolated and without site-packages: only the standard library can be imported.
_PYTHON = (os.path.realpath(sys.executable), "-I", "-S", "-c")
# No user namespace: root inside it would be the machine's root, which RLIMIT_NPROC does not limit.
_ROOT_OPTIONS = (
    *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
    *("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
)


class SandboxError(Exception):
    """No sandbox is available; the message gives the reason and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one run.

    Attributes:
        wall_s: wall time of the run. cpu_s: CPU time of each process, in whole seconds.
        memory_bytes: address space of each process. disk_bytes: size of each file.
        output_chars: stdout and stderr together are truncated to this number of characters.
        processes: concurrent processes and threads, checked every 20 ms; only in a sandbox.
    """

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_chars: int = 8192
    processes: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The result of a run.

    Attributes:
        code: exit code; negative, or above 128 in a sandbox, if a signal ended the program.
        timed_out: it exceeded `Limits.wall_s`.
        too_many_processes: it exceeded `Limits.processes`.
    """

    code: int
    output: str
    timed_out: bool = False
    too_many_processes: bool = False


@functools.cache
def sandbox_fault() -> str:
    """Return why no sandbox can be used, or "" if one can."""
    if not sys.platform.startswith("linux"):
        return f"bubblewrap needs Linux, but the platform is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "bwrap is not installed (package bubblewrap)"
    return "" if _runs_as_root() else _try_sandbox(as_root=False)


def require_sandbox(unsafe_without_sandbox: str = "") -> bool:
    """Return True if a sandbox can be used, and False if the user agrees to run without one.

    Args:
        unsafe_without_sandbox: `UNSAFE` to agree.
    Raises:
        SandboxError: no sandbox can be used, and the user has not agreed to run without one.
    """
    fault = sandbox_fault()
    if not fault:
        return True
    if unsafe_without_sandbox == UNSAFE:
        return False
    raise SandboxError(
        f"no sandbox for the code of the model: {fault}; install bubblewrap, or, on a "
        f'disposable machine, set unsafe_without_sandbox = "{UNSAFE}"'
    )


def run_python(code: str, *, limits: Limits, sandboxed: bool = True) -> Finished:
    """Run a program in a new process and return its output.

    Args:
        sandboxed: False applies the limits only, in a temporary directory.
    Raises:
        ValueError: the program has more than `MAX_CODE_BYTES` bytes.
    """
    if len(code.encode()) > MAX_CODE_BYTES:
        raise ValueError(f"the program has more than {MAX_CODE_BYTES} bytes")
    sandbox = _sandbox_command(limits.processes, as_root=_runs_as_root()) if sandboxed else ()
    with tempfile.TemporaryDirectory(prefix="turnfast-") as folder, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [*_limit_command(limits), *sandbox, *_PYTHON, code],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
            start_new_session=True,
        )
        try:
            process.wait(limits.wall_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill(process)
        size_bytes = os.fstat(out.fileno()).st_size
        out.seek(0)
        text = out.read(4 * limits.output_chars).decode("utf-8", errors="replace")
    if len(text) > limits.output_chars or size_bytes > 4 * limits.output_chars:
        text = text[: limits.output_chars] + "\n[output cut]"
    return Finished(
        code=process.returncode,
        output=text,
        timed_out=timed_out,
        too_many_processes=sandboxed and process.returncode == TOO_MANY_PROCESSES,
    )


@functools.cache
def _runs_as_root() -> bool:
    """Return whether bwrap can use root's rights; otherwise it needs user namespaces."""
    return os.geteuid() == 0 and not _try_sandbox(as_root=True)


def _try_sandbox(*, as_root: bool) -> str:
    """Run a small program in a sandbox; return the reason if it fails, else ""."""
    try:
        ended = subprocess.run(
            [*_sandbox_command(8, as_root=as_root), *_PYTHON, "print(7)"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap cannot be run: {error}"
    if ended.returncode or ended.stdout != "7\n":
        return f"bwrap does not work here: {ended.stderr.strip()[:200] or ended.returncode}"
    return ""


def _sandbox_command(processes: int, *, as_root: bool) -> Sequence[str]:
    """Return the command that starts bwrap and its process 1, which starts the program."""
    init = Path(__file__).with_name("sandbox_init.py").read_text(encoding="utf-8")
    user_id = _FIRST_USER_ID + secrets.randbelow(_FIRST_USER_ID) if as_root else -1
    return [*_bwrap_command(as_root), *_PYTHON, init, str(processes), str(user_id)]


def _bwrap_command(as_root: bool) -> Sequence[str]:
    """Return the command of bwrap, without the program that it starts."""
    system = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
    bound = dict.fromkeys([*(path for path in system if os.path.exists(path)), sys.base_prefix])
    # Created explicitly, because bwrap makes missing parents readable for its own user only.
    parents = dict.fromkeys(str(p) for path in bound for p in reversed(Path(path).parents[:-1]))
    return [
        "bwrap",
        *(option for path in parents for option in ("--perms", "0755", "--dir", path)),
        *(option for path in bound for option in ("--ro-bind", path, path)),
        *("--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp"),
        *("--perms", "1777", "--size", str(MAX_HOME_BYTES), "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--die-with-parent", "--new-session", "--as-pid-1"),
        *(_ROOT_OPTIONS if as_root else ("--unshare-all", "--cap-drop", "ALL")),
        *("--hostname", "sandbox", "--"),
    ]


def _limit_command(limits: Limits) -> Sequence[str]:
    """Return a command that sets the limits and then executes the program.

    `ulimit` counts memory in KiB and file sizes in blocks of 512 bytes.
    """
    script = 'ulimit -t "$1" && ulimit -v "$2" && ulimit -f "$3" && shift 3 && exec "$@"'
    numbers = (limits.cpu_s, limits.memory_bytes >> 10, limits.disk_bytes >> 9)
    return ["/bin/sh", "-c", script, "limited", *map(str, numbers)]


def _kill(process: subprocess.Popen) -> None:
    """Kill the process group; the processes in a sandbox end with its process 1."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
