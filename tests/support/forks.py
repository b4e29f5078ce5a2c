"""Jobs in forked children, which may not outlive their test."""

import os
import signal
from collections.abc import Callable


def in_children(count: int, job: Callable[[], bool]) -> list[int]:
    """Exit codes of children that are forked at once: 0 if the job says so, -14 if it hangs."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            # the handler of pytest-timeout would go on in the child
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            code = 2
            try:
                code = 0 if job() else 1
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
