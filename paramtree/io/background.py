"""Work in the background that a program does not end without, and whose errors are not lost."""

import atexit
import concurrent.futures.thread  # noqa: F401  # it registers first, so that its threads end last
import sys
import threading
from collections.abc import Callable

__all__ = ["Task"]


class Task:
    """A function that runs in a thread of its own.

    A program that ends waits for it, however it ends, unless it is killed. An error is raised by
    ``wait``, or printed when the program ends.

    Args:
      work: the function.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="paramtree-save")
        _TASKS.add(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Waits for the end of the work, and raises its error, once."""
        self._thread.join()
        _TASKS.discard(self)
        error, self._error = self._error, None
        if error is not None:
            raise error


_TASKS: set[Task] = set()


def _finish() -> None:
    for task in list(_TASKS):
        try:
            task.wait()
        except BaseException:
            sys.excepthook(*sys.exc_info())


# Functions of atexit run after thread pools are shut down, and Orbax needs pools to finish a save. So
# this is registered where the pools themselves are, and later: the last to be registered runs first.
getattr(threading, "_register_atexit", atexit.register)(_finish)
