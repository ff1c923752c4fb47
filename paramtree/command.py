"""The command ``python -m paramtree``: what is in a checkpoint, for people and for scripts.

It lists from headers alone; values are read where they are asked for, and of a part only that. The
exit code tells a script how it went, and an error is one line. Nothing in a file is trusted: names are
printed with control characters spelled out, and never as HTML.
"""

import argparse
import contextlib
import html
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from paramtree.core.arrays import clip, printable
from paramtree.core.errors import ParamTreeError, RuleError
from paramtree.core.names import compiled, from_tree
from paramtree.core.structure import build, picker
from paramtree.core.tree import ParamTree, _rebuild

__all__ = ["main"]

_FINE, _DIFFERENT, _WRONG = 0, 1, 2
_INTERRUPTED, _NO_READER = 130, 141  # as shells have it for SIGINT and SIGPIPE

_CODES = """\
exit codes:
  0    fine; with --diff, nothing differs
  1    with --diff, something differs; with --match, no name matches
  2    wrong usage, or a file that cannot be read or written
  130  interrupted
  141  whoever read the output has gone, as with `| head`

Formats: safetensors, also the .index.json of several files; MXNet's .params; numpy's
.npz; Orbax folders. Which one a file is shows from its content; never a pickle.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: the arguments; those of the process if None.

    Example:
      >>> import numpy as np, paramtree as pt, tempfile
      >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
      >>> pt.save(file, pt.from_tree({"dense0": {"bias": np.zeros(2, np.float32)}}))
      >>> main([file, "--match", ".*bias"])
      ParamTree: 1 leaf, 2 parameters, 8 B
      └─ dense0                  2  8 B
         └─ bias  (2,)  float32  2  8 B
      0
    """
    try:
        arguments = _parsed(argv)
    except SystemExit as stop:  # after printing the help, or what is wrong
        return int(stop.code or 0)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return _NO_READER
    except _NoMatchError as error:
        return _complain(f"--match: {error}", _DIFFERENT)
    except OSError as error:
        known = error.filename is not None and error.strerror
        return _complain(f"{os.fspath(error.filename)}: {error.strerror}" if known else str(error))
    except MemoryError as error:
        return _complain(f"{arguments.file}: there is not enough memory. {error}")
    except ParamTreeError as error:
        return _complain(str(error))
    except Exception:  # Python's own exit code for it, 1, would say that something differs
        traceback.print_exc()
        return _WRONG


class _NoMatchError(Exception):
    """No name matches the pattern."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paramtree",
        description="Prints the tree of a checkpoint: names, shapes, dtypes, sizes, ties.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="a checkpoint")
    parser.add_argument(
        "--match",
        metavar="REGEX",
        type=_pattern,
        help="only the leaves whose whole names, such as dense0_weight, match",
    )
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--stats", action="store_true", help="print statistics of the values instead")
    jobs.add_argument("--diff", metavar="OTHER", help="print how another checkpoint differs instead")
    jobs.add_argument(
        "--convert",
        metavar="OUT",
        help="write the tree, with its ties and kinds, to a file in the format that its name ends in: "
        ".npz, .params, .orbax, or else safetensors; what --match leaves out is a hole",
    )
    parser.add_argument(
        "--html",
        metavar="OUT",
        help="write what would be printed as a page of HTML, which needs no other file; - prints it",
    )
    arguments = parser.parse_args(argv)
    if arguments.convert is not None and arguments.html is not None:
        parser.error("argument --html: not allowed with argument --convert, which prints nothing")
    return arguments


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return compiled(text)
    except RuleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(arguments: argparse.Namespace) -> int:
    out = arguments.html if arguments.convert is None else arguments.convert
    if out is not None:
        _check_apart(out, [path for path in (arguments.file, arguments.diff) if path is not None])
    if arguments.convert is not None:
        _convert(arguments)
        return _FINE
    status = _FINE
    if arguments.diff is not None:
        from paramtree.inspect.diff import diff

        shown: Any = diff(*_both(arguments))
        status = _DIFFERENT if shown else _FINE
    elif arguments.stats:
        from paramtree.inspect.stats import stats

        shown = stats(_values(arguments.file, arguments.match))
    else:
        from paramtree.io import peek

        shown = _matched(_selecting(arguments.match)(peek(arguments.file)), arguments.match)
    if arguments.html is None:
        lines = _lines(shown)
        del shown  # a tree of thousands of names is large, and the lines no longer need it
        _print(lines)
    else:
        _write_page(arguments, shown)
    return status


# What is read


def _values(path: str, pattern: re.Pattern[str] | None) -> ParamTree:
    """Returns the leaves of a file that match, with their values; no other is read."""
    from paramtree.io.load import load_part

    return _matched(load_part(path, _selecting(pattern)), pattern)


def _selecting(pattern: re.Pattern[str] | None) -> Callable[[ParamTree], ParamTree]:
    from paramtree.verbs.parts import select

    def choose(tree: ParamTree) -> ParamTree:
        if pattern is None:
            return tree
        try:
            return select(tree, pattern)
        except RuleError as error:
            raise _NoMatchError(str(error).removeprefix("select: ")) from None

    return choose


def _matched(tree: ParamTree, pattern: re.Pattern[str] | None) -> ParamTree:
    """Returns what a pattern left of a tree, without holes; those of the file are shown without one."""
    if pattern is None:
        return tree
    structure, order = build(tree._structure.entries(), tree._structure.kinds)
    return _rebuild(structure, picker(order)(tree._leaves))


def _both(arguments: argparse.Namespace) -> tuple[ParamTree, ParamTree]:
    """Returns the trees to compare. A pattern may match in one of them only: that is a difference."""
    trees = []
    unmatched = []
    for path in (arguments.file, arguments.diff):
        try:
            trees.append(_values(path, arguments.match))
        except _NoMatchError as error:
            trees.append(from_tree({}))
            unmatched.append(error)
    if len(unmatched) == 2:
        raise unmatched[0]
    return trees[0], trees[1]


# What is written


def _check_apart(out: str, inputs: Sequence[str]) -> None:
    """Raises ParamTreeError if writing a file would destroy what is read."""
    from paramtree.io.peek import open_source

    if not os.path.exists(out):
        return
    target = pathlib.Path(out).resolve()
    for path in inputs:
        with open_source(path) as source:
            parts = source.parts
        for part in (path, *parts):
            # A checkpoint of Orbax is a folder, in which a new one takes the place of those before.
            read = pathlib.Path(part).resolve()
            nested = read.is_relative_to(target) or target.is_relative_to(read)
            if nested or os.path.samefile(out, part):
                raise ParamTreeError(
                    f"{out} was not written: it is, or holds, {part}, which is read. Name another file."
                )


def _convert(arguments: argparse.Namespace) -> None:
    from paramtree.io.load import load_part
    from paramtree.io.peek import open_source
    from paramtree.io.save import save

    with open_source(arguments.file) as source:
        sep = "." if source.layout is None else source.layout.sep  # the names stay as they are
    tree = load_part(arguments.file, _selecting(arguments.match))
    with _writing(arguments.convert):
        save(arguments.convert, tree, sep=sep)


def _write_page(arguments: argparse.Namespace, shown: Any) -> None:
    from paramtree.io.atomic import replacing

    page = _page(arguments, shown)
    if arguments.html == "-":
        _print([page], "xmlcharrefreplace")
        return
    with _writing(arguments.html), replacing(arguments.html) as new:
        pathlib.Path(new).write_text(page, encoding="utf-8")


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # which may name the new file beside it, and nobody knows that one
        raise ParamTreeError(f"{path} was not written: {error.strerror or error}.") from error


# What is shown


def _lines(shown: Any) -> Iterable[str]:
    from paramtree.inspect import outline

    if isinstance(shown, ParamTree):
        return outline.lines(outline.outline(shown))
    return [shown.table().text(most=None)]


def _page(arguments: argparse.Namespace, shown: Any) -> str:
    """Returns a page of HTML around what a notebook would show. Nothing in it runs or is fetched."""
    from paramtree.inspect.show import show

    files = [arguments.file, *([] if arguments.diff is None else [arguments.diff])]
    title = html.escape(printable(" and ".join(files)))
    body = (show(shown) if isinstance(shown, ParamTree) else shown)._repr_html_()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n</head>\n"
        f'<body style="font-family:system-ui,sans-serif;margin:1.5em">\n{body}\n</body>\n</html>\n'
    )


_LONGEST = 4000  # characters of an error: it may list names, and a name may be as long as a file
_PLAIN = str.maketrans("├└│─", "|`|-")


def _print(lines: Iterable[str], spelling: str = "backslashreplace") -> None:
    """Prints lines, with spellings of characters that the output does not have."""
    out = sys.stdout
    if out is None:  # closed by whoever started this
        return
    encoding = out.encoding or "utf-8"
    try:
        for line in lines:
            try:
                line.encode(encoding)
            except UnicodeEncodeError:
                line = line.translate(_PLAIN).encode(encoding, spelling).decode(encoding)
            print(line, file=out)
        out.flush()
    except OSError as error:
        # The rest would be written, and fail again, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ParamTreeError(f"the output could not be written: {error.strerror}.") from error


def _complain(message: str, code: int = _WRONG) -> int:
    line = printable(clip(" ".join(message.splitlines()), _LONGEST))
    with contextlib.suppress(OSError):  # the exit code still tells
        print(f"python -m paramtree: {line}", file=sys.stderr)
    return code
