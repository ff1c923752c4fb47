"""What every verb costs against the number of leaves: none is worse than linear."""

import itertools
from typing import Any

from benchmarks.suite.case import Bound, Case, Timed

PATTERN = ".*weight"
SIZES = (10, 100, 1000, 10_000)
# A linear verb has 10, one that sorts 13.3, and 10,000 leaves no longer fit in the processor's cache. A
# verb that searches all leaves for each has 100.
LIMIT = 15.0


def nested(leaves: int) -> dict[str, Any]:
    """Returns blocks of ten small arrays, as nested dicts."""
    import numpy as np

    small = np.ones((4, 4), np.float32)
    layers = {f"dense{j}": {"weight": small, "bias": small[0]} for j in range(5)}
    return {"blocks": {str(i): layers for i in range(max(1, leaves // 10))}}


def of_trees(leaves: int, fresh: Any) -> dict[str, Any]:
    """Returns the verbs that name, select and change leaves; ``fresh`` makes a new structure."""
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec

    import paramtree as pt
    from paramtree.parametrizations import Frozen

    blocks = range(max(1, leaves // 10))
    pairs = {f"blocks/{i}/dense1": f"blocks/{i}/dense0" for i in blocks}
    weights = {f"blocks/{i}/dense0/weight": np.zeros((4, 4), np.float32) for i in blocks}
    new = {f"new/{i}": np.zeros(4, np.float32) for i in blocks}
    rules = {PATTERN: 1, ".*": 0}
    mesh = Mesh(np.array(jnp.zeros(()).devices().pop()).reshape(1), ("data",))
    specs = {PATTERN: PartitionSpec("data"), ".*": PartitionSpec()}
    frozen = {PATTERN: Frozen()}
    calls = {
        "to_dict": lambda tree: tree.to_dict(),
        "collect": lambda tree: pt.collect(tree, PATTERN),
        "select": lambda tree: pt.select(tree, PATTERN),
        "partition": lambda tree: pt.partition(tree, PATTERN),
        "mask": lambda tree: pt.mask(tree, PATTERN),
        "labels": lambda tree: pt.labels(tree, rules),
        "map_named": lambda tree: pt.map_named(lambda name, leaf: leaf, tree),
        "replace": lambda tree: pt.replace(tree, weights),
        "cast": lambda tree: pt.cast(tree, {PATTERN: "bfloat16", ".*": None}),
        "rename": lambda tree: pt.rename(tree, [("dense0", "first")]),
        "drop": lambda tree: pt.drop(tree, ".*bias"),
        "insert": lambda tree: pt.insert(tree, new),
        "tie": lambda tree: pt.tie(tree, pairs),
        "shardings": lambda tree: pt.shardings(tree, mesh, specs),
        "expand": lambda tree: pt.expand(tree, frozen),
        "count": pt.count,
        "nbytes": pt.nbytes,
        "print": repr,
        "show": lambda tree: pt.show(tree)._repr_html_(),
        "diff": lambda tree: pt.diff(tree, tree),
        "check_match": lambda tree: pt.check_match(tree, tree),
    }
    works: dict[str, Any] = {verb: Timed(call, before=fresh) for verb, call in calls.items()}
    works["merge"] = Timed(lambda two: pt.merge(*two), before=lambda: pt.partition(fresh(), PATTERN))
    works["ties"] = Timed(pt.ties, before=lambda: pt.tie(fresh(), pairs))
    works["untie"] = Timed(pt.untie, before=lambda: pt.tie(fresh(), pairs))
    works["fold"] = Timed(lambda tree: pt.fold(tree, frozen), before=lambda: pt.expand(fresh(), frozen))
    return works


def of_values(fresh: Any) -> dict[str, Any]:
    """Returns the verbs that compute with the values of a tree of jax's arrays."""
    import jax

    import paramtree as pt

    key = jax.random.key(0)
    normal = {PATTERN: pt.initializers.Normal(), ".*": "zeros"}

    def placed() -> Any:
        return jax.block_until_ready(jax.device_put(fresh()))

    def first(tree: Any) -> Any:
        return tree["blocks/0/dense0/weight"].sum()

    calls = {
        "stack": lambda tree: pt.stack(tree, "blocks"),
        "pack": pt.pack,
        "stats": pt.stats,
        "find_nonfinite": pt.find_nonfinite,
        "reinit": lambda tree: pt.reinit(tree, key, normal),
        "grad": pt.grad(first, wrt=PATTERN),
    }

    def compiled(call: Any, before: Any) -> Timed:
        def ready(tree: Any) -> Any:
            return jax.block_until_ready(call(tree))

        def warm() -> Any:  # the programs of other verbs may have taken the place of its own
            ready(before())
            return before()

        return Timed(ready, before=warm)

    works = {verb: compiled(call, placed) for verb, call in calls.items()}
    works["unstack"] = compiled(
        lambda tree: pt.unstack(tree, "blocks"), lambda: pt.stack(placed(), "blocks")
    )

    def changed() -> Any:  # one that was just packed still has its leaves
        return jax.block_until_ready(jax.tree.map(lambda buffer: buffer * 2, pt.pack(placed())))

    works["unpack"] = compiled(pt.unpack, changed)
    return works


def of_files(fresh: Any) -> dict[str, Any]:
    """Returns the verbs of files."""
    import paramtree as pt
    from benchmarks.suite.cases.files import folder

    path = folder() / "growth.safetensors"
    like = fresh()
    pt.save(path, like)
    return {
        "save": Timed(lambda tree: pt.save(path.with_stem("other"), tree), before=fresh),
        "load": lambda: pt.load(path),
        "load, like": lambda: pt.load(path, like=like),
        "peek": lambda: pt.peek(path),
    }


def ours(leaves: int) -> dict[str, Any]:
    """Returns every verb, on structures that no verb has seen before."""
    import gc

    import jax

    import paramtree as pt

    gc.disable()  # with many trees alive, the collector takes half of the time, and in some calls only
    base = nested(leaves)
    leaf = base["blocks"]["0"]["dense0"]["bias"]
    numbers = itertools.count()

    def plain() -> Any:
        return {**base, f"extra{next(numbers)}": leaf}

    def fresh() -> Any:
        return pt.from_tree(plain())

    def model(p: Any) -> None:
        for i in range(leaves):
            p[f"level{i // 2}"].param(f"leaf{i % 2}", (4,), pt.initializers.One())

    key = jax.random.key(0)
    return {
        "from_tree": Timed(pt.from_tree, before=plain),
        **of_trees(leaves, fresh),
        **of_values(fresh),
        "abstract": lambda: pt.abstract(model),
        "init": lambda: jax.block_until_ready(pt.init(model, key)),
        **of_files(fresh),
    }


VERBS = (
    "from_tree", "to_dict", "collect", "select", "partition", "mask", "labels", "map_named",
    "replace", "cast", "rename", "drop", "insert", "tie", "shardings", "expand", "count", "nbytes",
    "print", "show", "diff", "check_match", "merge", "ties", "untie", "fold", "stack", "pack",
    "stats", "find_nonfinite", "reinit", "grad", "unstack", "unpack", "abstract", "init", "save",
    "load", "peek", "load, like",
)  # fmt: skip

CASES = [
    Case(
        name="growth",
        title="What each verb costs against the number of leaves",
        sizes=SIZES,
        contenders={"paramtree": ours},
        bounds=tuple(
            Bound(verb, "paramtree", LIMIT, base=1000, when=lambda size: size == 10_000)
            for verb in VERBS
        ),
        rounds=1,
        turns=2,
        slice=0.02,
        seconds=90,
        smoke=(20,),
        cached=True,
        together=True,
        note=(
            "Blocks of ten small arrays. Each call gets a tree of a structure that no verb has seen, "
            f"so nothing is looked up; ten times the leaves may take {LIMIT:g} times as long. "
            "Compilation is not measured, and Python's garbage collector is off, as in `timeit`."
        ),
    ),
]
