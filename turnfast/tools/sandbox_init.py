"""The first process inside the sandbox: starts the program, and ends them all if they get many.

Nothing imports its functions: sandbox.py passes its text to an interpreter, as process 1 of a
namespace of its own. The program can neither end nor outlive process 1.

The kernel's limit on processes, RLIMIT_NPROC, is what holds up a fork bomb: process 1 alone would
hardly get a turn among them. It counts per user, within a user namespace since Linux 5.14, and it
does not bind root. So root's program runs as a user that nothing else on the machine runs as.
"""

import os
import resource
import signal
import sys

TOO_MANY = 254
"""Exit code for more processes and threads than allowed; a program's own 254 becomes 1."""
LOOK_EVERY_S = 0.02


def main(limit: int, user: int, program: list[str]) -> None:
    """Run a program with at most `limit` processes and threads; `user` < 0 keeps the user."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if user >= 0:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        if user >= 0 or counted_here():
            # one more than is allowed, so that it can be seen; process 1 counts for its own user
            most = limit + (1 if user >= 0 else 2)
            resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        os.execv(program[0], program)
    while count() <= limit:
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_EVERY_S)
        reap(child)
    os._exit(TOO_MANY)


def counted_here() -> bool:
    """Whether the kernel counts a user's processes within the namespace alone."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 14)


def reap(child: int) -> None:
    """Collect what has ended; when the program has, everything ends with its code."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(128 - code if code < 0 else 1 if code == TOO_MANY else code)
        if ended == 0:
            return


def count() -> int:
    """Processes and threads of the namespace, without this one."""
    number = -1
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                number += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # it has ended meanwhile
                continue
    return number


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
