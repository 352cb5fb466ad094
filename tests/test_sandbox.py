"""The sandbox for untrusted code: isolation, limits, and the error without a sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from by_script import play

from turnfast.envs import load_env
from turnfast.errors import ConfigError
from turnfast.tools.sandbox import (
    MAX_CODE_BYTES,
    UNSAFE,
    Limits,
    SandboxError,
    require_sandbox,
    run_python,
    sandbox_fault,
)
from turnfast.tools.sandbox_init import limit_is_per_namespace

needs_sandbox = pytest.mark.skipif(bool(sandbox_fault()), reason=f"no sandbox: {sandbox_fault()}")
SIZES = {"train_tasks": 4, "eval_tasks": 2}
GENEROUS = Limits(wall_s=60.0, cpu_s=30)


def run(code: str, limits: Limits = GENEROUS):
    return run_python(code, limits=limits)


@needs_sandbox
def test_exit_code_and_output():
    ended = run("print(chr(0x1f600))")
    assert (ended.code, ended.output) == (0, "\U0001f600\n")
    failed = run("import sys; print('before'); sys.exit(3)")
    assert (failed.code, failed.output) == (3, "before\n")
    assert "ZeroDivisionError" in run("1 / 0").output


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("open('/x', 'w')", "Read-only file system"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('/etc/passwd')", "No such file"),
        ("import os; os.listdir('/home')", "No such file"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "Network is unreachable"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('/tmp/x', 'wb').write(bytes(64 << 20))", "File too large"),
        ("for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(8 << 20))", "No space left"),
        ("import torch", "No module named 'torch'"),
        (
            "import os\nfor pid in (1, os.getppid()):\n  try: os.kill(pid, 9)\n"
            "  except PermissionError: pass\nos.stat('/nope')",
            "nope",
        ),
    ],
)
def test_forbidden_actions_fail(code, error):
    ended = run(code)
    assert ended.code != 0 and error in ended.output


@needs_sandbox
def test_environment_processes_and_files_of_the_host_are_hidden(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    code = "print(json.dumps([dict(os.environ), [p for p in os.listdir('/proc') if p.isdigit()]]))"
    output = run(f"import json, os\n{code}").output
    environment, processes = json.loads(output)
    assert "SECRET_KEY" not in environment and "hunter2" not in output
    assert len(processes) <= 2 and str(os.getpid()) not in processes
    assert run("open('/tmp/note', 'w').write('x')").code == 0
    assert run("import os; print(os.listdir('/tmp'))").output == "[]\n"


@needs_sandbox
def test_resource_limits_are_set():
    code = (
        "import resource as r\n"
        "print([r.getrlimit(x)[1] for x in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE)])"
    )
    limits = Limits(wall_s=60.0, cpu_s=7, memory_bytes=256 << 20, disk_bytes=1 << 20)
    assert run(code, limits).output == f"[7, {256 << 20}, {1 << 20}]\n"


@needs_sandbox
def test_wall_time_output_and_code_size_are_limited():
    ended = run("import time; time.sleep(600)", Limits(wall_s=5.0))
    assert (ended.timed_out, ended.code) == (True, -signal.SIGKILL)
    flood = run("print('y' * 10**6)", Limits(wall_s=60.0, output_chars=100))
    assert flood.output == "y" * 100 + "\n[output cut]"
    with pytest.raises(ValueError, match="more than 100000 bytes"):
        run("#" * (MAX_CODE_BYTES + 1))


@needs_sandbox
def test_child_processes_end_with_the_program():
    # The child keeps the output file open; the call must return anyway.
    ended = run("import os, time\nif os.fork() == 0: time.sleep(600)\nprint('done')")
    assert ended.output == "done\n" and not ended.timed_out
    assert not [line for line in command_lines() if "if os.fork() == 0: time.sleep(600)" in line]


@needs_sandbox
@pytest.mark.skipif(
    os.geteuid() != 0 and not limit_is_per_namespace(),
    reason="the kernel limits processes per user namespace only since Linux 5.14",
)
@pytest.mark.parametrize(
    "bomb",
    [
        "while True:\n  try: os.fork()\n  except OSError: pass",
        "while True: os.spawnl(os.P_NOWAIT, sys.executable, 'x', '-c', bomb)",
        "threading.stack_size(65536)\n"
        "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_a_fork_bomb_is_stopped(bomb):
    code = f"import os, sys, threading, time\nbomb = {bomb!r}\n{bomb}"
    begin = time.perf_counter()
    ended = run(code, Limits(wall_s=60.0, cpu_s=30, processes=24))
    assert not ended.timed_out and time.perf_counter() - begin < 30.0
    failures = ("temporarily unavailable", "thread")
    assert ended.too_many_processes or any(text in ended.output for text in failures)
    assert not [line for line in command_lines() if "import os, sys, threading" in line]


@needs_sandbox
def test_a_few_processes_and_threads_are_allowed():
    code = (
        "import os, threading\n"
        "ts = [threading.Thread(target=len, args=((),)) for _ in range(8)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
        "for _ in range(100):\n  if not os.fork(): os._exit(0)\n  os.wait()\n"
        "print('done', flush=True); os._exit(254)"
    )
    ended = run(code)
    assert (ended.output, ended.code, ended.too_many_processes) == ("done\n", 1, False)


def command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            lines.append(path.read_text(errors="replace"))
    return lines


@pytest.fixture
def no_bwrap(monkeypatch):
    monkeypatch.setenv("PATH", "")
    sandbox_fault.cache_clear()
    yield
    sandbox_fault.cache_clear()


def test_without_a_sandbox_code_runs_only_if_the_user_agrees(no_bwrap):
    assert "bwrap is not installed" in sandbox_fault()
    for text in ("", "yes", "true", "i understand"):
        with pytest.raises(SandboxError, match=r"no sandbox .* bwrap is not installed"):
            require_sandbox(text)
    assert require_sandbox(UNSAFE) is False
    with pytest.raises(ConfigError, match=r"unsafe_without_sandbox = \"I understand that"):
        load_env("python", SIZES)
    env = load_env("python", {**SIZES, "unsafe_without_sandbox": UNSAFE})
    assert result(env, "print(2 + 2)") == "<result>4</result>"


def result(env, code: str) -> str:
    """The reply of the environment to a call of its tool."""
    call = json.dumps({"name": "python", "args": {"code": code}})
    _, (step,), _ = play(env, env.tasks("train")[0], f"<tool>{call}</tool>")
    return step.messages[0]["content"]


@needs_sandbox
def test_the_python_environment_shows_results_and_errors():
    env = load_env("python", {**SIZES, "wall_s": 30.0}, tool_timeout_s=60.0)
    assert result(env, "print('a', 1)") == "<result>a 1</result>"
    assert "Error: Traceback" in result(env, "nope") and "NameError" in result(env, "nope")
    assert result(env, "pass") == "<result>No result.</result>"
    short = load_env("python", {**SIZES, "wall_s": 1.0})
    error = "<result>Error: the program did not end within 1 s</result>"
    assert result(short, "import time; time.sleep(60)") == error


@needs_sandbox
def test_wall_s_must_be_less_than_the_tool_timeout():
    with pytest.raises(ConfigError, match=r"env.options.wall_s: 5 s must be less than .* = 3 s"):
        load_env("python", SIZES, tool_timeout_s=3.0)
