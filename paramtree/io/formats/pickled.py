"""The data in a pickle, without what it would run.

A pickle is a program, which names functions and calls them. Here a name is looked up in the caller's
table of functions and nowhere else: nothing is imported. An object that the table cannot make becomes
an ``Inert``, which knows its name and nothing more. Sizes are checked before memory is taken, and the
number of steps is limited, as each may make an object of a hundred bytes.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

__all__ = ["Entries", "Global", "Inert", "Window", "read_pickle"]

_PROTOCOL = 5  # the newest
_MEMO = 2**32  # keys of the memo are below
_KEY = 2**64  # and whole numbers as keys of a dict
_LITERALS = frozenset([  # opcodes whose argument is the value
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
])  # fmt: skip
_CONSTRUCTORS = ("copyreg.__newobj__", "copyreg._reconstructor", "copy_reg._reconstructor")
_ARGUMENTS = 16  # none of the functions has more


class Window:
    """The next bytes of a file, up to a size: it never asks for more, which would be allocated."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(max(0, min(size, self.left)))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(self.left)
        self.left -= len(data)
        return data


class Global:
    """The name of a function or a class, with its module."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Inert:
    """An object that was not made: the name of its class, or of the function to call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self, state: Any) -> None:
        """Takes the state of the object, and forgets it."""


class Entries(dict[tuple[str, str], Any]):
    """A dict: values by the type and the text of their keys; ``odd`` counts keys of other types.

    A file could choose numbers of one hash, and take hours to insert them; it cannot choose texts so.
    """

    __slots__ = ("odd",)

    def __init__(self) -> None:
        super().__init__()
        self.odd = 0

    def put(self, key: Any, value: Any) -> None:
        """Adds an entry."""
        if isinstance(key, str | float | None) or (isinstance(key, int) and -_KEY < key < _KEY):
            self[type(key).__name__, str(key)] = value
        else:
            self.odd += 1

    def build(self, state: Any) -> None:
        """Ignores attributes, such as the versions in a state dict."""


def read_pickle(
    stream: Window,
    makers: Mapping[str, Callable[..., Any]],
    most: int,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object in a pickle.

    Args:
      stream: where it begins; afterwards where it ended.
      makers: functions that make objects, by the names that the pickle has for them.
      most: the most steps that it may take; an item of an argument counts as one.
      persistent: returns the object that an identifier stands for.

    Raises:
      Exception: it is damaged. The text says how, or the type does.
    """
    machine = _Machine(makers, persistent, most)
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
        machine.spend()
        if opcode.name in _LITERALS:
            machine.stack.append(argument)
        else:
            _ACTIONS[opcode.name](machine, argument)
    (result,) = machine.stack
    return result


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, makers: Mapping[str, Callable[..., Any]], persistent: Any, most: int) -> None:
        self.makers, self.persistent = makers, persistent
        self.most = self.left = most  # steps
        self.names: dict[tuple[str, str], Global] = {}
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}

    def spend(self, *used: Any) -> None:
        """Counts a step, and one more for each item of what is used in it."""
        self.left -= 1
        for value in used:
            if isinstance(value, list | tuple | dict):
                self.left -= len(value)
        if self.left < 0:
            raise ValueError(f"it takes more than {self.most:,} steps, which no dict of arrays needs")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self, _: Any = None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Returns what is above the last mark, and removes it."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        """Returns some items from the top, and removes them."""
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise ValueError("the stack is empty")
        del self.stack[-count:]
        return items

    def discard(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def discard_marked(self, _: Any) -> None:
        self.marked()

    def frozen(self, _: Any) -> None:
        self.marked()
        self.push(Inert("builtins.frozenset"))

    def put(self, key: int | None) -> None:
        key = len(self.memo) if key is None else key
        if not 0 <= key < _MEMO:
            raise ValueError(f"the memo has no place {key}")
        self.memo[key] = self.stack[-1]

    def named(self, _: Any) -> None:
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of an object is not a text")
        if (module, name) not in self.names:  # a memo may give long texts again and again
            self.names[module, name] = Global(f"{module}.{name}")
        self.push(self.names[module, name])

    def make(self, maker: Any, arguments: Any) -> None:
        """Pushes what the table makes of a name and arguments, or something inert."""
        if isinstance(maker, Global) and isinstance(arguments, tuple) and maker.name in self.makers:
            self.spend(arguments, *arguments[:_ARGUMENTS])
            self.push(self.makers[maker.name](*arguments))
        else:
            self.push(Inert(maker.name if isinstance(maker, Global | Inert) else type(maker).__name__))

    def reduce(self, _: Any) -> None:
        maker, arguments = self.last(2)
        if isinstance(maker, Global) and maker.name in _CONSTRUCTORS:
            maker, arguments = arguments[0], ()
        self.make(maker, arguments)

    def construct(self, _: Any) -> None:
        maker, *arguments = self.marked()
        self.make(maker, tuple(arguments))

    def construct_named(self, name: str) -> None:
        arguments = self.marked()
        self.make(Global(name.replace(" ", ".", 1)), tuple(arguments))

    def construct_with_names(self, _: Any) -> None:
        maker, arguments, _names = self.last(3)
        self.make(maker, arguments)

    def build(self, _: Any) -> None:
        state = self.pop()
        self.spend(state)
        self.stack[-1].build(state)

    def append(self, items: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ValueError(f"it appends to a {type(target).__name__}")

    def insert(self, items: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, Entries | Inert):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        if isinstance(target, Entries):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target.put(key, value)

    def mapping(self, _: Any) -> None:
        items = self.marked()
        self.push(Entries())
        self.insert(items)

    def identified(self, key: Any) -> None:
        if self.persistent is None:
            raise ValueError("it refers to objects outside of it")
        self.spend(key)
        self.push(self.persistent(key))


def _refuse(machine: _Machine, argument: Any) -> None:
    raise ValueError("it refers to buffers outside of it")


def _protocol(machine: _Machine, number: int) -> None:
    if number > _PROTOCOL:
        raise ValueError(f"its protocol is {number}, and {_PROTOCOL} is the newest known")


# What each opcode does, besides those of literals.
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _protocol,
    "FRAME": lambda machine, size: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push(Entries()),
    "EMPTY_SET": lambda machine, _: machine.push(Inert("builtins.set")),
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_marked,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.push(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.last(3)),
    "LIST": lambda machine, _: machine.push(machine.marked()),
    "DICT": _Machine.mapping,
    "FROZENSET": _Machine.frozen,
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.marked()),
    "ADDITEMS": lambda machine, _: machine.append(machine.marked()),
    "SETITEM": lambda machine, _: machine.insert(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.insert(machine.marked()),
    "MEMOIZE": _Machine.put,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, key: machine.push(machine.memo[key])
    ),
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"), lambda machine, code: machine.push(Inert(f"extension {code}"))
    ),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
    "GLOBAL": lambda machine, name: machine.push(Global(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": _Machine.named,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.construct_with_names,
    "OBJ": _Machine.construct,
    "INST": _Machine.construct_named,
    "BUILD": _Machine.build,
    "PERSID": _Machine.identified,
    "BINPERSID": lambda machine, _: machine.identified(machine.pop()),
}
