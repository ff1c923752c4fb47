"""Shardings by name, and leaves that are made and read part by part, on eight devices of one CPU."""

import ast
import gc
import math
import re
import warnings
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.sharding import shardings as sharding
from tests.catalogue import trees

NET = nn.Sequential(nn.Dense(8, activation="relu"), nn.Dense(16))
X = jax.ShapeDtypeStruct((4, 24), jnp.float32)
RULES = {".*weight": P("model"), ".*": None}


def mesh(data: int = 2, model: int = 4) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


MESHES = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)]


def specs(tree: Any) -> Any:
    return jax.tree.map(lambda s: s.spec, tree)


def equal(one: Any, other: Any) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def lies(tree: Any, placed: Any) -> bool:
    """Whether arrays lie where shardings say."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return all(leaf.sharding == sharding for leaf, sharding in pairs)


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(pt.RuleError) as caught:
        pt.shardings(*args, **kwargs)
    return str(caught.value)


# Rules


@given(trees())
def test_every_tree_gets_a_tree_like_it(tree: Any) -> None:
    found = pt.shardings(tree, mesh(), {".*": None} if jax.tree.leaves(tree) else {})
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert all(leaf == NamedSharding(mesh(), P()) for leaf in jax.tree.leaves(found))
    assert equal(jax.device_put(tree, found), tree)


def test_the_first_pattern_that_matches_gives_the_spec() -> None:
    params = pt.abstract(NET, X)
    found = pt.shardings(
        params, mesh(), {"dense1_weight": P(None, "data"), ".*weight": ("model", None), ".*": None}
    )
    assert list(jax.tree.leaves(specs(found))) == [P("model", None), P(), P(None, "data"), P()]
    several = pt.shardings(params, mesh(), {"dense1_weight": P(("data", "model")), ".*": None})
    assert several.dense1.weight.shard_shape((16, 8)) == (2, 8)


def test_names_of_ones_own_go_through_a_table() -> None:
    rules = {".*weight": P("out", "in"), ".*bias": P("out")}
    params = pt.abstract(NET, X)
    found = pt.shardings(params, mesh(), rules, axes={"out": ("data", "model"), "in": None})
    assert found.dense0.weight.spec == P(("data", "model"), None)
    assert "'in': not an axis of the mesh" in message(params, mesh(), rules, axes={"out": None})
    text = message(params, mesh(), rules, axes={"out": "modle", "in": None})
    assert "'modle', which axes= gives for 'out': not an axis of the mesh" in text
    assert "Did you mean `model`?" in text


def test_all_that_is_wrong_is_in_one_message() -> None:
    text = message(
        pt.abstract(NET, X),
        mesh(),
        {
            "dense0_weight": P("model", None, "data"),
            "dense1_weight": P("data", "data"),
            "dense0_bias": P("tensor"),
            "dense1_bais": None,
        },
    )
    for part in (
        "'dense1_bais' matches no name; the closest are dense1_bias",
        f"'dense1_weight' gives {P('data', 'data')}, which uses the axis 'data' twice",
        "'dense0_bias' has 'tensor': not an axis of the mesh, which has 'data', 'model'",
        "`dense0_weight` (8, 24) is 2-dimensional, and the rule 'dense0_weight' has 3 dimensions",
        "no pattern matches dense1_bias; add a last rule '.*'",
    ):
        assert part in text
    text = message(pt.abstract(nn.Dense(6), X), mesh(), {".*": P("model")})
    assert "`weight` (6, 24) dimension 0, of 6, is not a multiple of 4, the size of 'model'" in text
    assert "`bias` (6,) dimension 0" in text and "To replicate what does not fit: uneven='rep" in text


def test_an_axis_may_be_used_once_among_several_too() -> None:
    text = message(pt.abstract(NET, X), mesh(), {".*": P(("data", "model", "data"))})
    assert "uses the axis 'data' twice" in text


@pytest.mark.parametrize("spec", ["model", 3, P(3), P(P.UNCONSTRAINED), NamedSharding(mesh(1, 1), P())])
def test_what_is_no_spec_is_refused(spec: Any) -> None:
    assert re.search(
        "a spec is expected|not an axis of the mesh", message({"a": X}, mesh(), {"a": spec})
    )


def test_arguments_of_the_wrong_kind() -> None:
    params = pt.abstract(NET, X)
    with pytest.raises(pt.RuleError, match="are a mapping of patterns to values"):
        pt.shardings(params, mesh(), P("model"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="found a dict for the mesh"):
        pt.shardings(params, RULES, mesh())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uneven is 'error' or 'replicate', not True"):
        pt.shardings(params, mesh(), RULES, uneven=True)  # type: ignore[arg-type]


def test_what_is_not_divided_may_be_kept_whole_and_is_said() -> None:
    params = pt.abstract(nn.Dense(6), X)
    for _ in range(2):  # also when the answer is known
        with pytest.warns(
            UserWarning, match=r"replicated on every device: `weight` \(6, 24\) dimension 0"
        ):
            found = pt.shardings(
                params, mesh(), {".*weight": P("model", "data"), ".*": None}, uneven="replicate"
            )
    assert found.weight.spec == P(None, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pt.shardings(params, mesh(), {".*": None}, uneven="replicate")


def test_leaves_without_a_rule_get_the_default() -> None:
    params = pt.abstract(NET, X)
    found = pt.shardings(params, mesh(), {".*weight": P("model")}, default=P("data"))
    assert found.dense0.bias.spec == P("data")
    assert "the default gives 'data'" in message(params, mesh(), RULES, default="data")


def test_a_tied_leaf_has_one_sharding() -> None:
    params = pt.from_tree({"embed": {"w": jnp.zeros((8, 4))}, "out": {"w": jnp.zeros((8, 4))}})
    tied = pt.tie(params, {"out/w": "embed/w"})
    found = pt.shardings(tied, mesh(), {".*w": P("model")})
    assert len(jax.tree.leaves(found)) == 1 and found.out.w is found.embed.w
    assert pt.ties(found) == pt.ties(tied)
    text = message(tied, mesh(), {"embed.*": P("model"), "out.*": None})
    assert "one tied leaf gets different values: embed_w by 'embed.*', out_w by 'out.*'" in text
    same = pt.shardings(tied, mesh(), {"embed.*": P("model"), "out.*": ("model",)})
    assert same.embed.w.spec == P("model")


def test_a_part_of_a_tree_takes_the_rules_of_the_whole() -> None:
    rules = {"dense0.*": P("model"), "dense1.*": None}
    part = pt.select(pt.abstract(NET, X), "dense0_.*")
    assert specs(pt.shardings(part, mesh(), rules)).dense0.bias == P("model")
    assert "'dense2.*' matches no name" in message(part, mesh(), {**rules, "dense2.*": None})


def test_other_pytrees_keep_their_container() -> None:
    tree = {"params": {"dense": {"kernel": jnp.zeros((8, 4))}}, "step": 3, "act": jnp.tanh}
    found = pt.shardings(tree, mesh(), {".*kernel": P("model")})
    assert found["act"] is None and found["step"].spec == P()
    assert found["params"]["dense"]["kernel"].spec == P("model")
    assert "no pattern matches params_dense_kernel" in message(tree, mesh(), {})
    assert "'.*weight' matches no name" in message(tree, mesh(), {".*": None, ".*weight": None})
    nested = pt.shardings([pt.abstract(NET, X), jnp.zeros(4)], mesh(), {"1": P("data"), **RULES})
    assert nested[0].dense0.weight.spec == P("model") and nested[1].spec == P("data")


STATES = {
    "adamw": optax.adamw(1e-3),
    "sgd": optax.sgd(0.1),
    "schedule": optax.sgd(optax.linear_schedule(0, 1, 5)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "ema": optax.ema(0.9),
}


@pytest.mark.parametrize("tx", STATES.values(), ids=STATES)
def test_a_state_of_an_optimiser_takes_the_same_rules(tx: Any) -> None:
    params = pt.init(NET, jax.random.key(0), X)
    state = tx.init(params)
    found = pt.shardings(state, mesh(), RULES)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    wanted = pt.shardings(params, mesh(), RULES)
    inner = jax.tree.leaves(found, is_leaf=lambda v: isinstance(v, pt.ParamTree))
    trees = [one for one in inner if isinstance(one, pt.ParamTree)]
    assert all(jax.tree.leaves(one) == jax.tree.leaves(wanted) for one in trees)
    assert equal(jax.device_put(state, found), state)


def test_masked_and_labelled_optimisers_take_the_same_rules() -> None:
    params = pt.init(NET, jax.random.key(0), X)
    slow = pt.labels(params, {".*weight": "a", ".*": "b"})
    for tx in (
        optax.masked(optax.adam(1e-3), pt.mask(params, ".*weight")),
        optax.multi_transform({"a": optax.adam(1e-3), "b": optax.sgd(1e-3)}, slow),
    ):
        state = tx.init(params)
        found = pt.shardings(state, mesh(), RULES)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert {leaf.spec for leaf in jax.tree.leaves(found)} == {P("model"), P()}


def test_a_whole_name_in_a_state_may_have_a_rule_of_its_own() -> None:
    params = pt.init(NET, jax.random.key(0), X)
    state = optax.adafactor(1e-3).init(params)
    assert "`0_v_row_dense0_weight` (1,) dimension 0" in message(state, mesh(), RULES)
    found = pt.shardings(state, mesh(), {r"\d+_v_(row|col)_.*": None, **RULES})
    assert found[0].v.dense0.weight.spec == P("model") and found[0].v_row.dense0.weight.spec == P()


# Optimiser states whose leaves have other shapes than the parameters of their names

GRID = {".*weight": P("model", "data"), ".*": P()}
FACTORED = optax.adafactor(0.1, min_dim_size_to_factor=8)
# Each with the first leaf that the rules do not fit, if any.
ODD: dict[str, tuple[Any, str]] = {
    "adafactor": (FACTORED, "`0_v_row_dense0_weight` (8,) is 1-dimensional"),
    "adafactor_whole": (optax.adafactor(0.1), "`0_v_row_dense0_weight` (1,) is 1-dimensional"),
    "zero_nans": (optax.zero_nans(), "`found_nan_dense0_weight` () is 0-dimensional"),
    "novograd": (optax.novograd(0.1), "`0_nu_dense0_weight` () is 0-dimensional"),
    "lbfgs": (
        optax.lbfgs(0.1, 10, linesearch=optax.scale_by_backtracking_linesearch(2)),
        "`0_diff_params_memory_dense0_weight` (10, 8, 24) dimension 0, of 10, is not a multiple of 4",
    ),
    "lbfgs_even": (optax.lbfgs(0.1, memory_size=8, linesearch=None), ""),
    "sm3": (optax.sm3(0.1), ""),
    "apply_if_finite": (
        optax.apply_if_finite(FACTORED, 3),
        "`inner_state_0_v_row_dense0_weight` (8,) is 1-dimensional",
    ),
    "multi_steps": (
        optax.MultiSteps(FACTORED, 2).gradient_transformation(),
        "`inner_opt_state_0_v_row_dense0_weight` (8,) is 1-dimensional",
    ),
    "inject": (
        optax.inject_hyperparams(optax.novograd)(learning_rate=0.1),
        "`inner_state_0_nu_dense0_weight` () is 0-dimensional",
    ),
    "schedule_free": (optax.contrib.schedule_free_adamw(0.1), ""),
}
if hasattr(optax.contrib, "muon"):
    ODD["muon"] = (optax.contrib.muon(0.1), "")


@cache
def step_of(name: str) -> Any:
    """Returns a step of an optimiser, ``(params, state) -> (params, state)``."""

    def loss(params: Any) -> Any:
        return jnp.mean((NET(params, jnp.sin(jnp.arange(96.0)).reshape(4, 24)) - 1) ** 2)

    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        update = optax.with_extra_args_support(ODD[name][0]).update
        updates, state = update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


def take_steps(step: Any, params: Any, state: Any) -> Any:
    """Returns parameters and state after two steps."""
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
        return step(*step(params, state))


def advised(text: str) -> Any:
    """Returns the pattern that an error advises to put first."""
    found = re.search(
        r"or, for this tree, a first rule for each such name, as in \{(.*): None, \.\.\.", text
    )
    assert found and "uneven='replicate'" in text, text
    return ast.literal_eval(found[1])


def follow(tree: Any, rules: Any, **options: Any) -> tuple[Any, list[str]]:
    """Returns the shardings with the first rules that errors advise, and these patterns."""
    patterns: list[str] = []
    while True:
        try:
            first: Any = dict.fromkeys(patterns)
            return pt.shardings(tree, mesh(), first | {**rules, **first}, **options), patterns
        except pt.RuleError as error:
            patterns.append(advised(str(error)))
            assert len(set(patterns)) == len(patterns)


@pytest.mark.parametrize("uneven", [pytest.param("error", marks=pytest.mark.slow), "replicate"])
@pytest.mark.parametrize("name", ODD)
def test_a_state_of_other_shapes_takes_the_rules_of_the_parameters(name: str, uneven: str) -> None:
    tx, misfit = ODD[name]
    params = pt.init(NET, jax.random.key(0), X)
    state = tx.init(params)
    alone: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if misfit and uneven == "error":
            assert misfit in message(state, mesh(), GRID)
            found, alone = follow(state, GRID)
        else:
            found = pt.shardings(state, mesh(), GRID, uneven=uneven)
    texts = [str(one.message) for one in caught]
    assert len(texts) == bool(misfit and uneven == "replicate")
    assert all(text.startswith(f"replicated on every device: {misfit}") for text in texts)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    # Leaves of the shape of a parameter have its spec; what is replicated instead is named.
    shapes = {path: leaf.shape for path, leaf in pt.collect(params).items()}
    named = pt.collect(state).items()
    for (path, leaf), place in zip(named, jax.tree.leaves(found), strict=True):
        own = path[path.find("dense") :]
        if shapes.get(own) == leaf.shape:
            assert place.spec == (P("model", "data") if own.endswith("weight") else P())
        elif own.endswith("weight") and place.is_fully_replicated:
            assert path in alone or any(f"`{path}`" in text for text in texts)
    where = pt.shardings(params, mesh(), GRID)
    placed = jax.device_put((params, state), (where, found))
    assert lies(placed, (where, found)) and equal(placed[1], state)
    step = jax.jit(step_of(name), in_shardings=(where, found), out_shardings=(where, found))
    after = take_steps(step, *placed)
    assert lies(after, (where, found))
    wanted = take_steps(jax.jit(step_of(name)), params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after, wanted)


@pytest.mark.parametrize("name", [name for name, (_, misfit) in ODD.items() if misfit])
def test_plain_dicts_and_trees_made_of_states_are_refused_and_advised_alike(name: str) -> None:
    tx, misfit = ODD[name]
    state = tx.init(pt.init(NET, jax.random.key(0), X).to_dict())
    for tree in (state, pt.from_tree(state)):
        if tree is state and name == "zero_nans":  # scalars alone need no rule
            assert all(place.spec == P() for place in jax.tree.leaves(pt.shardings(tree, mesh(), GRID)))
            continue
        assert misfit.split("` ")[1] in message(tree, mesh(), GRID)
        found, patterns = follow(tree, GRID)
        assert patterns and equal(jax.device_put(tree, found), tree)
        for _ in range(2):  # also when the answer is known
            with pytest.warns(UserWarning, match="replicated on every device: `.*dense0_"):
                other = pt.shardings(tree, mesh(), GRID, uneven="replicate")
        assert equal(jax.device_put(tree, other), tree)


def test_rules_for_the_names_of_a_state_come_first() -> None:
    state = ODD["lbfgs"][0].init(pt.init(NET, jax.random.key(0), X))
    rules = {".*_memory_.*weight": P(None, "model", "data"), **GRID}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for uneven in ("error", "replicate"):
            found = pt.shardings(state, mesh(), rules, uneven=uneven)[0]
            assert found.diff_params_memory.dense1.weight.shard_shape((10, 16, 8)) == (10, 4, 4)
            assert found.params.dense1.weight.spec == P("model", "data")


@pytest.mark.parametrize("spec", [None, P(), P(None), P(None, None), [(), None]])
@pytest.mark.parametrize("name", ODD)
def test_a_spec_of_no_axes_fits_every_shape(name: str, spec: Any) -> None:
    state = jax.eval_shape(ODD[name][0].init, pt.abstract(NET, X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pt.shardings(state, mesh(), {".*": spec})
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert place.is_fully_replicated and place.shard_shape(leaf.shape) == leaf.shape


def test_a_shorter_spec_is_of_the_first_dimensions() -> None:
    state = FACTORED.init(pt.init(NET, jax.random.key(0), X))
    with pytest.warns(UserWarning, match=r"`0_v_dense0_weight` \(1,\) dimension 0, of 1, is not a mul"):
        found = pt.shardings(state, mesh(), RULES, uneven="replicate")[0]
    assert specs(found.v_row).dense0.weight == specs(found.v_col).dense0.weight == P("model")
    assert found.v.dense0.weight.is_fully_replicated


def test_a_spec_too_long_for_a_parameter_is_refused_or_replicated_too() -> None:
    params = pt.abstract(NET, X)
    rules = {".*": P("model", None)}
    text = message(params, mesh(), rules)
    assert "`dense0_bias` (8,) is 1-dimensional, and the rule '.*' has 2 dimensions" in text
    assert follow(params, rules)[1] == ["dense0_bias", "dense1_bias"]
    assert follow(params, {"dense0.*": P("model")}, default=P("data", None))[1] == ["dense1_bias"]
    with pytest.warns(UserWarning, match=r"`dense0_bias` \(8,\) is 1-dimensional, and the rule '\.\*'"):
        found = pt.shardings(params, mesh(), rules, uneven="replicate")
    made = pt.init(NET, jax.random.key(0), X, shardings=found)
    assert lies(made, found) and equal(made, pt.init(NET, jax.random.key(0), X))
    assert specs(made.dense0.weight.sharding) == P("model", None)


def test_advice_holds_for_names_of_every_sort() -> None:
    shared = pt.tie(
        pt.init(nn.Sequential(nn.Dense(24), nn.Dense(24)), jax.random.key(0), X), {"dense1": "dense0"}
    )
    assert follow(FACTORED.init(shared), GRID)[1][0] == "0_v_row_dense0_weight|0_v_row_dense1_weight"
    # A part of a tree has names of its own, though messages say where it is.
    part = pt.abstract(NET, X).dense1
    assert "`dense1_bias` (16,) is 1-" in message(part, mesh(), {".*": P("model", None)})
    assert follow(part, {".*": P("model", None)})[1] == ["bias"]
    assert follow(part, {"weight": P("model"), "bias": P("model", None)})[1] == ["bias"]
    odd = {"a.b(c)|d": jnp.ones(8), "a-b+": {"'x'": jnp.ones(())}, "axb": jnp.ones((8, 8))}
    found, _ = follow(odd, {".*": P("model", None)})
    assert found["axb"].spec == P("model", None) and found["a.b(c)|d"].is_fully_replicated


def test_a_message_lists_twenty_leaves() -> None:
    tree = {f"w{i:02}": jnp.ones(4) for i in range(23)} | {"u": jnp.ones((4, 4))}
    text = message(tree, mesh(), {".*": P("model", None)})
    assert "`w19` (4,)" in text and "; and 3 more. To" in text and "w20" not in text
    with pytest.warns(UserWarning, match=r"`w19` .*; and 3 more\.$"):
        pt.shardings(tree, mesh(), {".*": P("model", None)}, uneven="replicate")


def test_a_default_leaves_scalars_of_a_state_alone() -> None:
    state = optax.adam(1e-3).init(pt.init(NET, jax.random.key(0), X))
    found = pt.shardings(state, mesh(), {".*weight": P("model")}, default=P("data"))
    assert found[0].count.spec == P() and found[0].mu.dense0.bias.spec == P("data")
    assert "`0_count` () is 0-dimensional, and the rule '.*' has 1 dimension;" in message(
        FACTORED.init(pt.init(NET, jax.random.key(0), X)), mesh(), {".*": P("model")}
    )


@pytest.mark.parametrize("name", ODD)
def test_such_a_state_is_loaded_shown_and_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tx, misfit = ODD[name]
    state = tx.init(pt.init(NET, jax.random.key(0), X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = pt.shardings(state, mesh(), GRID, uneven="replicate")
        plan = pt.plan(NET, X, mesh(), GRID, tx=tx, uneven="replicate")
    file = saved(tmp_path, "safetensors", jax.device_put(state, found))
    loaded = pt.load(file, like=state, shardings=found)
    assert equal(loaded, state) and lies(loaded, found)
    shown = pt.show_sharding(state, found)
    assert str(shown) in capsys.readouterr().out
    assert shown.total == plan.per_device["optimiser"] and shown.whole == plan.whole["optimiser"]


def test_what_is_known_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A structure of its own: it lives, with what it knows, as long as any tree of it.
    net = nn.Sequential(known=nn.Dense(8), well=nn.Dense(16))
    params = pt.abstract(net, X)
    first = pt.shardings(params, mesh(), RULES)
    seen = weakref.ref(first)
    with monkeypatch.context() as patch:
        patch.delattr(sharding._Work, "of")
        assert pt.shardings(params, mesh(), dict(RULES)) is first
        with pytest.raises(AttributeError):
            pt.shardings(params, mesh(4, 2), RULES)
    other = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[:1] + (3,) * (a.ndim - 1), a.dtype), params
    )
    text = message(other, mesh(), {".*weight": P(None, "model"), ".*": None})
    assert "of 3, is not a multiple" in text
    assert pt.shardings(params, mesh(), {".*weight": P(None, "model"), ".*": None}) is not first
    del first, params, other
    gc.collect()
    assert seen() is None


def test_a_mesh_of_no_devices_will_do() -> None:
    found = pt.shardings(pt.abstract(NET, X), AbstractMesh((512, 4), ("data", "model")), RULES)
    assert found.dense1.weight.shard_shape((16, 8)) == (4, 8)


def test_jit_takes_them() -> None:
    params = pt.init(NET, jax.random.key(0), X)
    placed = pt.shardings(params, mesh(), RULES)
    step = jax.jit(
        lambda p: jax.tree.map(lambda a: a * 2, p), in_shardings=(placed,), out_shardings=placed
    )
    assert lies(step(params), placed)


# Initialisation

BLOCK = nn.Residual(norm=nn.RMSNorm(), dense=nn.Dense(16, flatten=False))
DEEP = nn.Sequential(nn.Dense(16), nn.Dense(16), blocks=nn.Repeat(BLOCK, 8), out=nn.Dense(64))
DEEP_RULES = {
    "blocks.*weight": P(None, "model", "data"),
    ".*weight": P("model", "data"),
    ".*": None,
}
INITIALIZERS = {
    "dense0_weight": init.Normal(),
    "blocks.*weight": init.Xavier(),
    "out_bias": init.Constant(np.arange(64.0)),
    "out_weight": init.Orthogonal(),
}
DEEP_X = jnp.ones((2, 16))


def largest_on_a_device(before: list[Any]) -> int:
    """Returns the bytes of the largest buffer of any device among arrays that are not in ``before``."""
    seen = set(map(id, before))  # which the list keeps alive, else another array may have an id again
    arrays = [a for a in jax.live_arrays() if id(a) not in seen and not a.is_deleted()]
    # Not from addressable_shards: with jax 0.8, an array whose shards were listed is never freed.
    parts = [a.nbytes // a.size * math.prod(a.sharding.shard_shape(a.shape)) for a in arrays if a.size]
    return max(parts, default=0)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_values_do_not_depend_on_the_mesh(shape: tuple[int, int]) -> None:
    wanted = pt.init(DEEP, jax.random.key(0), DEEP_X, rules=INITIALIZERS)
    placed = pt.shardings(pt.abstract(DEEP, DEEP_X), mesh(*shape), DEEP_RULES)
    found = pt.init(DEEP, jax.random.key(0), DEEP_X, rules=INITIALIZERS, shardings=placed)
    np.testing.assert_allclose(found.out.weight, wanted.out.weight, atol=1e-6)
    rest = "(?!out_weight).*"
    for a, b in zip(
        jax.tree.leaves(pt.select(found, rest)), jax.tree.leaves(pt.select(wanted, rest)), strict=True
    ):
        # One bit, since XLA computes the end of a part that is no whole vector in another way.
        np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), maxulp=1)
    assert lies(found, placed)


@pytest.mark.parametrize("given_inside", [True, False])
def test_under_jit_every_device_makes_its_part(given_inside: bool) -> None:
    placed = pt.shardings(pt.abstract(DEEP, DEEP_X), mesh(), DEEP_RULES)

    def make(key: Any) -> Any:
        return pt.init(DEEP, key, DEEP_X, shardings=placed if given_inside else None)

    compiled = jax.jit(make, out_shardings=placed).lower(jax.random.key(0)).compile()
    found = compiled(jax.random.key(0))
    wanted = pt.init(DEEP, jax.random.key(0), DEEP_X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found, wanted)
    assert lies(found, placed)
    assert "all-gather" not in str(compiled.as_text())


def test_no_leaf_is_whole_on_one_device_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from paramtree.initializers import draw

    net, x = nn.Sequential(nn.Dense(256), blocks=nn.Repeat(nn.Dense(256), 4)), jnp.ones((2, 256))
    rules = {"blocks_weight": P(None, "data", "model"), "dense0_weight": P("model", "data"), ".*": None}
    placed = pt.shardings(pt.abstract(net, x), mesh(), rules)
    before = jax.live_arrays()
    sizes, temporary = [], []

    def counted(compute: Any, place: Any) -> Any:
        made = jax.jit(compute, static_argnums=(0, 1, 2), out_shardings=place)

        def call(*args: Any) -> Any:
            value = jax.block_until_ready(made(*args))
            sizes.append(largest_on_a_device(before))
            memory: Any = made.lower(*args).compile().memory_analysis()
            temporary.append((memory.temp_size_in_bytes, value.nbytes))
            return value

        call.lower = made.lower  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(draw, "_sharded", counted)
    params = pt.init(net, jax.random.key(0), x, shardings=placed)
    largest = max(shard.data.nbytes for a in jax.tree.leaves(params) for shard in a.addressable_shards)
    assert len(sizes) == 4 and max(sizes) == largest == 4 * 256 * 256 * 4 // 8
    # What the compiled functions need beside their results is some times a part, not the whole.
    assert all(scratch < whole / 2 for scratch, whole in temporary if whole > 2**16)


def test_leaves_that_are_alike_are_compiled_once() -> None:
    from paramtree.initializers import draw

    net = nn.Sequential(*[nn.Dense(24, use_bias=False) for _ in range(5)])
    placed = pt.shardings(pt.abstract(net, X), mesh(), {".*": P("model")})
    pt.init(net, jax.random.key(0), X, shardings=placed)
    compiled = draw._sharded(draw._compute, placed.dense0.weight)
    before = compiled._cache_size()
    pt.init(net, jax.random.key(1), X, shardings=placed)
    assert compiled._cache_size() == before == 1


@pytest.mark.parametrize("place", [None, P("model")], ids=["whole", "divided"])
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_what_is_compiled_ahead_is_what_is_called(place: Any, make: Any) -> None:
    compiled: list[str] = []

    def listen(event: str, _: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about.get("fun_name", "")))

    size = 104 + 8 * ["key", "PRNGKey"].index(make.__name__) + 16 * (place is None)  # not seen before
    net = nn.Sequential(
        *[nn.Dense(size, weight_initializer=pt.initializers.Xavier()) for _ in range(3)]
    )
    shapes = pt.abstract(net, X)
    options = {} if place is None else {"shardings": pt.shardings(shapes, mesh(), {".*": place})}
    pt.init(nn.Dense(1), make(0), X)  # what is made once
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        params = pt.init(net, make(0), X, **options)
        first = list(compiled)
        again = pt.init(net, make(1), X, **options)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # Two shapes of weights; biases are filled on the host where they are whole.
    assert len([name for name in first if "_compute" in name]) == (2 if place is None else 3), first
    assert compiled == first
    assert not np.array_equal(params.dense0.weight, again.dense0.weight)


def test_a_key_on_another_device_and_a_raw_key() -> None:
    placed = NamedSharding(mesh(), P())
    wanted = pt.init(NET, jax.random.key(0), X)
    elsewhere = jax.device_put(jax.random.key(0), jax.devices()[3])
    for key in (elsewhere, jax.random.PRNGKey(0)):
        found = pt.init(NET, key, X, shardings=placed)
        assert equal(found, wanted) and found.dense0.weight.sharding == placed


def test_a_mesh_whose_axes_are_in_the_types() -> None:
    explicit = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    placed = pt.shardings(pt.abstract(DEEP, DEEP_X), explicit, DEEP_RULES)
    found = pt.init(DEEP, jax.random.key(0), DEEP_X, shardings=placed)
    assert lies(found, placed)
    assert equal(found, pt.init(DEEP, jax.random.key(0), DEEP_X))
    with jax.set_mesh(explicit):
        inside = jax.jit(lambda key: pt.init(DEEP, key, DEEP_X, shardings=placed))(jax.random.key(0))
    pairs = zip(jax.tree.leaves(inside), jax.tree.leaves(placed), strict=True)
    assert all(leaf.sharding.is_equivalent_to(where, leaf.ndim) for leaf, where in pairs)


@pytest.mark.parametrize("repeat", [False, True])
def test_loops_over_alike_leaves_keep_their_types(repeat: bool, monkeypatch: Any) -> None:
    from paramtree.initializers import loops

    monkeypatch.setattr(loops, "_PORTION", 0)
    monkeypatch.setattr(loops, "_LOOPS", 3)
    layers = [nn.Dense(16, flatten=False) for _ in range(7)]
    net: Any = nn.Repeat(layers[0], 7) if repeat else nn.Sequential(*layers)
    wanted = pt.init(net, jax.random.key(0), DEEP_X)
    explicit = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    where = P(*(None,) * repeat, "model")
    placed = pt.shardings(pt.abstract(net, DEEP_X), explicit, {".*": where})
    with jax.set_mesh(explicit):
        found = jax.jit(lambda key: pt.init(net, key, DEEP_X, shardings=placed))(jax.random.key(0))
    assert equal(found, wanted)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(placed), strict=True)
    assert all(leaf.sharding.is_equivalent_to(where, leaf.ndim) for leaf, where in pairs)

    # Each device draws leaves of its own.
    def own(seed: Any) -> Any:
        tree = pt.init(net, jax.random.key(seed[0]), DEEP_X)
        return jax.tree.map(lambda leaf: leaf[None], tree)

    drawn = jax.jit(
        jax.shard_map(own, mesh=mesh(), in_specs=P(("data", "model")), out_specs=P(("data", "model")))
    )
    trees = drawn(np.arange(8))
    for seed in (0, 5):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], trees)
        assert equal(one, pt.init(net, jax.random.key(seed), DEEP_X))


def test_copies_that_start_differently_are_spread_too() -> None:
    ramp = init.Mixed([".*"], [init.Constant(np.ones((16, 16)))])
    net, x = nn.Repeat(nn.Dense(16, flatten=False, use_bias=False), 4), DEEP_X
    placed = pt.shardings(pt.abstract(net, x), mesh(), {".*": P(None, "model")})
    found = pt.init(net, jax.random.key(0), x, rules={".*": ramp}, shardings=placed)
    assert found.weight.sharding == placed.weight and (found.weight == 1).all()
    traced = jax.jit(lambda k: pt.init(net, k, x, rules={".*": ramp}, shardings=placed))(
        jax.random.key(0)
    )
    assert equal(traced, found)


def test_shardings_of_another_tree_are_refused() -> None:
    placed = pt.shardings(pt.abstract(nn.Dense(4), X), mesh(), RULES)
    with pytest.raises(pt.MismatchError, match="the shardings for init are not of the tree"):
        pt.init(NET, jax.random.key(0), X, shardings=placed)
    rules: Any = pt.map_named(lambda name, leaf: P(), pt.abstract(NET, X))
    nowhere = pt.shardings(pt.abstract(NET, X), AbstractMesh((4,), ("model",)), RULES)
    with pytest.raises(pt.MismatchError, match="are of an AbstractMesh, which has no devices"):
        pt.init(NET, jax.random.key(0), X, shardings=nowhere)
    with pytest.raises(pt.MismatchError, match="takes a tree of arrays or shapes, but found one of sh"):
        pt.show_sharding(nowhere)
    with pytest.raises(pt.MismatchError, match=r"have a \w+, \w+\(\), where a jax.sharding.Sharding"):
        pt.init(NET, jax.random.key(0), X, shardings=rules)


# Files


def saved(folder: Path, ending: str, tree: Any) -> Path:
    file = folder / f"model.{ending}"
    pt.save(file, tree)
    return file


@pytest.mark.parametrize("ending", ["safetensors", "npz", "params", "orbax"])
def test_a_file_goes_straight_to_its_places(tmp_path: Path, ending: str) -> None:
    params = pt.init(NET, jax.random.key(0), X)
    first = pt.shardings(params, mesh(), RULES)
    file = saved(tmp_path, ending, jax.device_put(params, first))
    for shape, rules in (
        ((2, 4), {".*weight": P("model", "data"), ".*": None}),
        ((1, 8), {".*weight": P(None, "model"), ".*": P("model")}),
    ):
        placed = pt.shardings(params, mesh(*shape), rules)
        bare = pt.load(file, shardings=pt.shardings(pt.peek(file), mesh(*shape), rules))
        for found in (
            pt.load(file, like=params, shardings=placed),
            pt.load(file, like=pt.abstract(NET, X), shardings=placed),
            pt.load(file, like=jax.tree.map(np.asarray, params), shardings=placed),
            bare,
        ):
            assert equal(found, params)
            assert lies(found, placed)
        step = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)
        after = step(bare)  # two devices never share memory, so donating cannot mix them up
        assert equal(after, jax.tree.map(lambda a: a + 1, params))
        for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
            for shard in one.addressable_shards:
                assert (shard.data == np.asarray(other)[shard.index] + 1).all()


def test_only_the_parts_are_read_and_none_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramtree.io import source

    tree = pt.from_tree(
        {"a": np.arange(1024 * 2048, dtype=np.float32).reshape(1024, 2048), "b": np.ones(64, np.int8)}
    )
    file = saved(tmp_path, "safetensors", tree)
    half = Mesh(np.array(jax.devices()[:2]), ("x",))
    other = Mesh(np.array(jax.devices()[4:]), ("x",))
    read: list[int] = []
    fill = source._fill
    monkeypatch.setattr(
        source,
        "_fill",
        lambda path, readinto, span: (read.append(len(span)), fill(path, readinto, span)),
    )
    before = jax.live_arrays()
    for where, rules, pieces in (
        (half, {"a": P("x"), "b": P("x")}, 2 + 2),
        (other, {"a": P(None, "x"), "b": None}, 4 * 1024 + 1),
    ):
        read.clear()
        found = pt.load(file, shardings=pt.shardings(pt.peek(file), where, rules))
        assert sum(read) == 1024 * 2048 * 4 + 64 and len(read) == pieces
        assert equal(found, tree)
        assert largest_on_a_device(before) == 1024 * 2048 * 4 // where.size
        del found


@given(data=st.data())
def test_any_part_of_any_array_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    from paramtree.io.source import read_part

    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    dtype = np.dtype(data.draw(st.sampled_from(["float32", "uint8", "bool", "complex64", "int16"])))
    wide = data.draw(st.sampled_from([1, 5000]))
    shape = (*shape[:-1], shape[-1] * wide) if shape else shape
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    file = tmp_path_factory.getbasetemp() / "part.bin"
    file.write_bytes(b"head" + array.tobytes())
    index = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        if data.draw(st.booleans())
        else slice(None)
        for n in shape
    )
    with file.open("rb") as opened:
        found = read_part("part.bin", opened, 4, dtype, shape, index)
        assert found.dtype == dtype and np.array_equal(found, array[index])
        if found.size:
            opened_short = file.with_suffix(".short")
            opened_short.write_bytes(b"head")
            with (
                opened_short.open("rb") as short,
                pytest.raises(pt.LoadError, match="the file was truncated"),
            ):
                read_part("part.bin", short, 4, dtype, shape, index)


def test_dtypes_that_a_format_lacks_and_keys(tmp_path: Path) -> None:
    tree = pt.from_tree(
        {"key": jax.random.key(3), "small": jnp.ones(8, jnp.float8_e4m3b11fnuz), "step": np.int32(7)}
    )
    file = saved(tmp_path, "safetensors", tree)
    placed = pt.shardings(tree, mesh(), {"small": P("model"), ".*": None})
    found = pt.load(file, like=tree, shardings=placed)
    assert found.small.sharding == placed.small and (found.small == tree.small).all()
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(tree["key"])).all()


def test_casts_and_transforms_are_placed_too(tmp_path: Path) -> None:
    params = pt.init(NET, jax.random.key(0), X)
    file = saved(tmp_path, "safetensors", params)
    half = pt.cast(pt.abstract(NET, X), jnp.bfloat16)
    placed = pt.shardings(half, mesh(), {".*weight": P(None, "model"), ".*": None})
    for options in ({}, {"transform": {".*weight": lambda a: a * 1}}):
        found = pt.load(file, like=half, cast_dtype=True, shardings=placed, **options)
        assert equal(found, pt.cast(params, jnp.bfloat16))
        assert lies(found, placed)


def test_places_of_another_tree_are_refused(tmp_path: Path) -> None:
    params = pt.init(NET, jax.random.key(0), X)
    file = saved(tmp_path, "safetensors", params)
    placed = pt.shardings(params, mesh(), RULES)
    with pytest.raises(pt.MismatchError, match="the shardings for load are not of the tree"):
        pt.load(file, like=params, shardings=placed.dense0)
    everywhere = NamedSharding(mesh(), P())
    found = pt.load(file, shardings=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(found))


# Showing


def test_large_leaves_that_are_whole_everywhere_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    params = pt.init(NET, jax.random.key(0), X)
    placed = jax.device_put(params, pt.shardings(params, mesh(), RULES))
    found = pt.show_sharding(placed, above=60)
    text = capsys.readouterr().out
    assert text.rstrip("\n") == str(found)
    assert re.search(r"dense0_weight +\(8, 24\) +float32 +P\('model',?\) +192 B", text)
    assert re.search(r"dense1_bias +\(16,\) +float32 +P\(\) +64 B +replicated", text)
    assert "Replicated on every device, and above 60 B: dense1_bias." in text
    total = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert found.total == total and re.search(rf"total per device +{total} B", text)
    assert repr(found) == f"<4 leaves, {total} B per device>"
    assert found.to_dict()["leaves"][0]["shape"] == [8, 24]


def test_shapes_are_shown_with_shardings_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    params = pt.abstract(NET, X)
    with_them = pt.show_sharding(params, pt.shardings(params, mesh(), RULES))
    without = pt.show_sharding(params)
    assert "none" in capsys.readouterr().out
    assert with_them.whole == without.total == pt.nbytes(params) and with_them.total < without.total
    tied = pt.tie(pt.from_tree({"a": jnp.ones(8), "b": jnp.ones(8)}), {"b": "a"})
    assert pt.show_sharding({"params": tied, "step": 3, "f": jnp.tanh}).total == 8 * 4
