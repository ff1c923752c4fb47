"""Reading leaves under tracing, and tracing a deep model."""

from collections.abc import Callable
from typing import Any

from benchmarks.suite.case import Bound, Case
from benchmarks.suite.cases import mlp


def traced(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Returns a call that traces a function afresh."""
    import jax

    return lambda: jax.jit(lambda *args: function(*args)).trace(*args)


def metrics(
    params: Any,
    model: Callable[..., Any],
    reads: dict[str, Callable[[Any], Any]],
) -> dict[str, Callable[[], Any]]:
    """Returns calls that read leaves, read them under tracing, and trace the model."""
    x, _ = mlp.data(8, 1)
    calls = {}
    for name, read in reads.items():
        calls[f"{name}, traced"] = traced(read, params)
        calls[f"{name} alone"] = lambda read=read: read(params)
    return {**calls, "model, traced": traced(model, params, x)}


def ours(size: int) -> dict[str, Any]:
    net, params = mlp.tree_of(size, 8)
    names = [f"dense{i}" for i in range(size)]
    paths = [f"dense{i}/{leaf}" for i in range(size) for leaf in ("weight", "bias")]

    def by_attribute(p: Any) -> None:
        for name in names:
            layer = getattr(p, name)
            layer.weight, layer.bias  # noqa: B018  # only reads

    def by_path(p: Any) -> None:
        for path in paths:
            p[path]

    return metrics(params, net, {"attributes": by_attribute, "paths": by_path})


def by_dict(size: int) -> dict[str, Any]:
    import jax

    names = [f"dense{i}" for i in range(size)]

    def read(p: Any) -> None:
        for name in names:
            layer = p[name]
            layer["weight"], layer["bias"]

    def model(p: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ p[name]["weight"].T + p[name]["bias"])
        return x

    params = dict(zip(names, mlp.layers(size, 8), strict=True))
    return metrics(params, model, {"attributes": read, "paths": read})


def by_strict_dict(size: int) -> dict[str, Any]:
    import jax

    names = [f"dense{i}" for i in range(size)]

    def model(p: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ p[name]["weight"].T + p[name]["bias"][None, :])
        return x

    params = dict(zip(names, mlp.layers(size, 8), strict=True))
    return {"model, traced": traced(model, params, mlp.data(8, 1)[0])}


def peer(make: Callable[..., tuple[Any, Any]]) -> Callable[[int], dict[str, Any]]:
    """Returns a contender that only traces its model."""

    def contender(size: int) -> dict[str, Any]:
        model, params = make(size)
        return {"model, traced": traced(model, params, mlp.data(8, 1)[0])}

    return contender


STRICT = "dict, strict promotion"

CASES = [
    Case(
        name="access",
        title="Reading leaves under tracing, and tracing a deep model",
        sizes=(1000,),
        contenders={
            "paramtree": ours,
            "dict": by_dict,
            STRICT: by_strict_dict,
            "Equinox": peer(mlp.equinox_net),
        },
        bounds=tuple(
            Bound(f"{metric}, traced", "dict", 1.1, why=why)
            for metric, why in (("attributes", ""), ("paths", ""), ("model", "see the note"))
        ),
        size="layers",
        rounds=2,
        turns=3,
        slice=0.02,
        seconds=45,
        smoke=(2,),
        packages=("equinox",),
        note=(
            "A function that only reads every leaf of 1,000 layers, traced afresh each time and called "
            "directly (the dict is read by its keys in both rows); and an MLP of as many layers, "
            "traced. Layers support strict rank promotion, so they broadcast a bias in a separate "
            "equation, which accounts for most of the extra tracing time; `dict, strict promotion` "
            "does the same on a dict."
        ),
    )
]
