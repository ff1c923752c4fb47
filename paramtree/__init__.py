"""paramtree: named, immutable parameter trees for models that are pure functions.

The public names are listed in ``paramtree.api``. Importing the package loads only what every use
needs, the tree itself, which registers it with jax; the rest is loaded when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from paramtree.core.tree import ParamTree as ParamTree

if TYPE_CHECKING:
    from paramtree.api import *  # noqa: F403  # one list of names, for type checkers as for users

__version__ = "0.2.0"


if not TYPE_CHECKING:  # for which a name that is not in the list is an error

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):  # Python probes for protocols
            raise AttributeError(name)
        api = importlib.import_module("paramtree.api")  # an import statement would ask this function
        if not hasattr(api, name):
            from paramtree.core.errors import suggest

            hint = suggest(name, __dir__())
            raise AttributeError(f"module 'paramtree' has no attribute {name!r}.{hint}")
        value = globals()[name] = getattr(api, name)
        return value


def __dir__() -> list[str]:
    api = importlib.import_module("paramtree.api")
    return sorted(name for name in vars(api) if not name.startswith("_"))
