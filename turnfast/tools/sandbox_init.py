"""Process 1 of the sandbox: starts the program, counts its processes and reaps them.

sandbox.py passes the source of this file to an interpreter inside the sandbox. The program can
neither kill nor outlive process 1.

Counting is too slow to stop a fork bomb, so RLIMIT_NPROC limits the number of processes as well.
The kernel applies this limit per user (since Linux 5.14 per user namespace), and not to root.
Therefore, if the trainer runs as root, the program gets a user id that no other process has.
"""

import os
import resource
import signal
import sys

TOO_MANY_PROCESSES = 254
"""Exit code if there are more processes and threads than allowed; a program's own 254 becomes 1."""
POLL_INTERVAL_S = 0.02


def main(limit: int, user_id: int, program: list[str]) -> None:
    """Run a program with at most `limit` processes and threads, as user `user_id` if it is >= 0."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if user_id >= 0:
            os.setgroups([])
            os.setresgid(user_id, user_id, user_id)
            os.setresuid(user_id, user_id, user_id)
        if user_id >= 0 or limit_is_per_namespace():
            # One more than allowed, so that process 1 can count too many. Without a user id of its
            # own, the program shares the limit with process 1.
            most = limit + (1 if user_id >= 0 else 2)
            resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        os.execv(program[0], program)
    while count_processes() <= limit:
        signal.sigtimedwait({signal.SIGCHLD}, POLL_INTERVAL_S)
        reap(child)
    os._exit(TOO_MANY_PROCESSES)


def limit_is_per_namespace() -> bool:
    """Return whether the kernel counts RLIMIT_NPROC per user namespace."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 14)


def reap(child: int) -> None:
    """Reap ended processes; if the program has ended, exit with its exit code."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(128 - code if code < 0 else 1 if code == TOO_MANY_PROCESSES else code)
        if ended == 0:
            return


def count_processes() -> int:
    """Return the number of processes and threads in the namespace, without process 1."""
    count = -1
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # the process has ended meanwhile
                continue
    return count


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
