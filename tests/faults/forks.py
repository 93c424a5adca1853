"""Work in a forked child of the tests: it may be limited, killed or made another user, and imports nothing again."""

import os
import resource
import signal
import sys
import time
import traceback
from types import SimpleNamespace


def in_fork(work, *, silent=False):
    """Begin `work` in a child; its number, and the end of a pipe with what it prints, None where it is silent."""
    read, write = (None, None) if silent else os.pipe()
    pid = os.fork()
    if pid:
        if write is not None:
            os.close(write)
        return pid, read
    code = 99
    try:
        target = os.open(os.devnull, os.O_WRONLY) if write is None else write
        for number in (1, 2):
            os.dup2(target, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        work()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def result(work):
    """`work` in a child, to its end: its exit code and what it printed."""
    pid, read = in_fork(work)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return SimpleNamespace(code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text=text)


def killed(work, wait):
    """`work` in a child that is killed when `wait` returns; whether it was killed before its end."""
    pid, _ = in_fork(work, silent=True)
    wait(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def at_a_moment(rng, longest, folder):
    """Waits for a random moment: of the whole run, or soon after something appeared in a folder."""
    begins = rng.random() < 0.7
    pause = rng.uniform(0, longest / 5 if begins else longest)

    def wait(ended):
        before = set(os.listdir(folder))
        while begins and not ended() and set(os.listdir(folder)) <= before:
            time.sleep(0.0005)
        until = time.monotonic() + pause
        while time.monotonic() < until and not ended():
            time.sleep(0.0005)

    return wait


def limit(name, value):
    """Lower a limit of this process."""
    resource.setrlimit(getattr(resource, name), (value, value))
