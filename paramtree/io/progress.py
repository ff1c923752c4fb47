"""A progress bar, on a terminal only, for what takes more than a second."""

import contextlib
import glob
import os
import sys
import threading
from collections.abc import Callable, Iterator

__all__ = ["progress", "written"]

_AFTER, _EVERY = 1.0, 0.1  # seconds: when the bar appears, and how often it moves


@contextlib.contextmanager
def progress(
    what: str, total: int, shown: bool | None, more: Callable[[], int] = lambda: 0
) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts bytes as done, and shows a bar meanwhile.

    The bar is drawn by a thread of its own, on the standard error, and erased at the end.

    Args:
      what: what is done, such as "loading model.npz".
      total: how many bytes there are.
      shown: True shows a bar from the beginning; None after a second if the standard error is a
        terminal; False never.
      more: returns how many bytes are done that were not yet counted.

    Example:
      >>> with progress("loading", 10, shown=False) as count:
      ...     count(10)
    """
    delay = _AFTER if shown is None else 0.0
    if shown is None:
        shown = sys.stderr is not None and sys.stderr.isatty()
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size

    if not shown:
        yield count
        return
    ended = threading.Event()
    drawing = threading.Thread(
        target=_draw, args=(what, total, lambda: done + more(), ended, delay), daemon=True
    )
    drawing.start()
    try:
        yield count
    finally:
        ended.set()
        drawing.join()


def _draw(what: str, total: int, done: Callable[[], int], ended: threading.Event, delay: float) -> None:
    if ended.wait(delay):
        return
    from rich.console import Console  # which takes a tenth of a second to import
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what.replace("[", r"\["), total=total)
        while not ended.wait(_EVERY):
            bar.update(task, completed=min(done(), total), refresh=True)
        bar.update(task, completed=min(done(), total), refresh=True)


def written(path: str) -> int:
    """Returns the size of the unfinished file that ``replacing`` writes for a path, in bytes."""
    folder, name = os.path.split(os.path.realpath(path))
    stem, ending = os.path.splitext(name)
    sizes = 0
    start = name.encode()[:150].decode(errors="ignore")
    for pattern in (f".{start}.unfinished-*", f".{stem}-*{ending}.unfinished-*"):
        for new in glob.glob(os.path.join(glob.escape(folder), pattern, "new")):
            with contextlib.suppress(OSError):
                sizes += os.stat(new).st_size
    return sizes
