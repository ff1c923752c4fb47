"""The command ``python -m paramtree``: prints what is in a checkpoint.

Listing reads only headers; other jobs read only the leaves that they need. The exit code is meant for
scripts, and an error is one line. Files are not trusted: control characters in names are escaped, and
so is HTML.
"""

import argparse
import contextlib
import html
import itertools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from paramtree import __version__
from paramtree.core.arrays import clip, printable
from paramtree.core.errors import ParamTreeError, RuleError
from paramtree.core.rules import compiled
from paramtree.core.tree import ParamTree
from paramtree.verbs.assemble import take_apart
from paramtree.verbs.from_tree import from_tree
from paramtree.verbs.uncollected import uncollected

__all__ = ["main"]

_OK, _DIFFERENT, _ERROR = 0, 1, 2
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as in shells, for SIGINT and SIGPIPE

_CODES = """\
exit codes:
  0    success; with --diff, no differences
  1    with --diff, differences; with --match, no name matches
  2    wrong usage, or a file that cannot be read or written
  130  interrupted
  141  broken pipe, as with `| head`

Reads safetensors (or an .index.json of several files), MXNet's .params, numpy's .npz,
Orbax folders, PyTorch's .pt, .pth and .bin, Flax's .msgpack and Keras's .h5, recognized
from their content. Nothing in a file is run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
      argv: the arguments; by default those of the process.

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
    except SystemExit as stop:  # argparse has printed the help or an error
        return int(stop.code or 0)
    listing = arguments.convert is None and arguments.diff is None and not arguments.stats
    try:
        with uncollected() if listing else contextlib.nullcontext():
            return _run(arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return _BROKEN_PIPE
    except _NoMatchError as error:
        return _fail(f"--match: {error}", _DIFFERENT)
    except OSError as error:
        known = error.filename is not None and error.strerror
        return _fail(f"{os.fspath(error.filename)}: {error.strerror}" if known else str(error))
    except MemoryError as error:
        return _fail(f"{arguments.file}: not enough memory. {error}")
    except ParamTreeError as error:
        return _fail(str(error))
    except Exception:  # Python would exit with 1, which means that the files differ
        traceback.print_exc()
        return _ERROR


class _NoMatchError(Exception):
    """The pattern matches no name."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paramtree",
        description="Prints the tree of a checkpoint: names, shapes, dtypes, sizes, ties.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="a checkpoint")
    parser.add_argument("--version", action="version", version=f"paramtree {__version__}")
    parser.add_argument(
        "--match",
        metavar="REGEX",
        type=_pattern,
        help="only leaves whose full name, such as dense0_weight, matches",
    )
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--stats", action="store_true", help="print statistics of the values instead")
    jobs.add_argument("--diff", metavar="OTHER", help="print how another checkpoint differs instead")
    jobs.add_argument(
        "--convert",
        metavar="OUT",
        help="write the tree, with its ties and kinds, to a file in the format of its extension: "
        ".npz, .params, .orbax, otherwise safetensors; leaves that --match leaves out become holes",
    )
    parser.add_argument(
        "--html",
        metavar="OUT",
        help="write the output as a self-contained HTML page instead; - prints the page",
    )
    arguments = parser.parse_args(argv)
    arguments.inputs = [path for path in (arguments.file, arguments.diff) if path is not None]
    if arguments.convert == "-":
        parser.error("argument --convert: a file is written, not the standard output: name one")
    if arguments.convert is not None and arguments.html is not None:
        parser.error("argument --html: not allowed with argument --convert, which has no output")
    return arguments


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return compiled(text)
    except RuleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(arguments: argparse.Namespace) -> int:
    for out in (arguments.html, arguments.convert):
        if out not in (None, "-"):
            _check_apart(out, arguments.inputs)
    if arguments.convert is not None:
        _convert(arguments)
        return _OK
    if arguments.diff is not None:
        from paramtree.inspect.diff import diff

        report: Any = diff(*_both(arguments))
    elif arguments.stats:
        from paramtree.inspect.stats import stats

        report = stats(_values(arguments.file, arguments.match))
    else:
        from paramtree.io.peek import peek

        report = _matched(_selected(peek(arguments.file), arguments.match), arguments.match)
    status = _DIFFERENT if arguments.diff is not None and report else _OK
    if arguments.html is None:
        lines = _lines(report)
        del report  # frees a large tree, which the lines no longer need
        _print(lines)
    else:
        _write_page(arguments, report)
    return status


# Reading


def _values(path: str, pattern: re.Pattern[str] | None) -> ParamTree:
    """Reads the matching leaves of a file, and no others."""
    from paramtree.io.load import load_part

    return _matched(load_part(path, partial(_selected, pattern=pattern)), pattern)


def _selected(tree: ParamTree, pattern: re.Pattern[str] | None) -> ParamTree:
    from paramtree.verbs.split import select

    try:
        return tree if pattern is None else select(tree, pattern)
    except RuleError as error:
        raise _NoMatchError(str(error).removeprefix("select: ")) from None


def _matched(tree: ParamTree, pattern: re.Pattern[str] | None) -> ParamTree:
    """Returns a selection without its holes; without a pattern, the tree with the holes of the file."""
    if pattern is None:
        return tree
    parts = take_apart(tree)
    return parts.assembled(entry for entry in parts.entries if entry.label in parts.leaves)


def _both(arguments: argparse.Namespace) -> tuple[ParamTree, ParamTree]:
    """Returns the trees to compare. A pattern that matches in only one of them is a difference."""
    trees, unmatched = [], []
    for path in arguments.inputs:
        try:
            trees.append(_values(path, arguments.match))
        except _NoMatchError as error:
            trees.append(from_tree({}))
            unmatched.append(error)
    if len(unmatched) == 2:
        raise unmatched[0]
    return trees[0], trees[1]


# Writing


def _check_apart(out: str, inputs: Sequence[str]) -> None:
    """Raises ParamTreeError if writing a file would overwrite an input."""
    from paramtree.io.opening import INDEX, open_source

    # A model in several files is replaced by a file of the same name, and its index goes.
    targets = [pathlib.Path(target).resolve() for target in (out, out + INDEX)]
    for path in inputs:
        with open_source(path) as source:
            parts = path, source.path, *source.parts
        for part in parts:
            # An Orbax checkpoint is a folder, and a save deletes the earlier checkpoints in it.
            read = pathlib.Path(part).resolve()
            for target in targets:
                nested = read.is_relative_to(target) or (read.is_dir() and target.is_relative_to(read))
                same = target.exists() and read.exists() and os.path.samefile(target, read)
                if nested or same:
                    raise ParamTreeError(
                        f"{out} was not written: it is or contains the input {part}. Write to another "
                        "file."
                    )


def _convert(arguments: argparse.Namespace) -> None:
    from paramtree.io.load import load_part
    from paramtree.io.opening import open_source
    from paramtree.io.save import keeps, save

    with open_source(arguments.file) as source:
        sep = "." if source.layout is None else source.layout.sep  # keeps the names
        metadata = dict(source.metadata) if keeps(arguments.convert, "metadata") else {}
    tree = load_part(arguments.file, partial(_selected, pattern=arguments.match))
    with _writing(arguments.convert):
        save(arguments.convert, tree, sep=sep, metadata=metadata)


def _write_page(arguments: argparse.Namespace, report: Any) -> None:
    from paramtree.io.atomic import replacing

    page = _page(arguments, report)
    if arguments.html == "-":
        _print([page], "xmlcharrefreplace")
        return
    with _writing(arguments.html), replacing(arguments.html) as new:
        pathlib.Path(new).write_text(page, encoding="utf-8")


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # it may name the temporary file, which would puzzle users
        raise ParamTreeError(f"{path} was not written: {error.strerror or error}.") from error


# Printing


def _lines(report: Any) -> Iterable[str]:
    from paramtree.inspect import outline

    if isinstance(report, ParamTree):
        return outline.lines(outline.outline(report))
    return [report.table().text(most=None)]


def _page(arguments: argparse.Namespace, report: Any) -> str:
    """Returns an HTML page with the report as in a notebook. It has no scripts and fetches nothing."""
    from paramtree.inspect.show import show

    title = html.escape(printable(" and ".join(arguments.inputs)))
    body = (show(report) if isinstance(report, ParamTree) else report)._repr_html_()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n</head>\n"
        f'<body style="font-family:system-ui,sans-serif;margin:1.5em">\n{body}\n</body>\n</html>\n'
    )


_LONGEST = 4000  # characters of an error, which may quote a name as long as the file
_AT_ONCE = 1000  # lines printed at once
_PLAIN = str.maketrans("├└│─", "|`|-")


def _print(lines: Iterable[str], spelling: str = "backslashreplace") -> None:
    """Prints lines, escaping characters that the output encoding lacks."""
    out = sys.stdout
    if out is None:  # closed by the parent process
        return
    encoding = out.encoding or "utf-8"
    try:
        every = iter(lines)
        while some := list(itertools.islice(every, _AT_ONCE)):
            try:
                "".join(some).encode(encoding)
            except UnicodeEncodeError:
                some = [_spelled(line, encoding, spelling) for line in some]
            print("\n".join(some), file=out)
        out.flush()
    except OSError as error:
        # Otherwise Python would flush the rest at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ParamTreeError(f"the output could not be written: {error.strerror}.") from error


def _spelled(line: str, encoding: str, spelling: str) -> str:
    """Returns a line with other characters for those that an encoding lacks."""
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return line.translate(_PLAIN).encode(encoding, spelling).decode(encoding)
    return line


def _fail(message: str, code: int = _ERROR) -> int:
    line = printable(clip(" ".join(message.splitlines()), _LONGEST))
    with contextlib.suppress(OSError):  # the exit code still reports it
        print(f"python -m paramtree: {line}", file=sys.stderr)
    return code
