"""The recipes match independent computations, and stay short."""

import ast
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from examples import recipes
from examples.recipes import loss, mean_loss, net
from paramtree import initializers as init
from paramtree import nn

pytestmark = pytest.mark.slow

XS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
YS = np.arange(6, dtype=np.int32) % 3
LR = 0.1


def tied_net(p: Any, x: Any) -> Any:
    """A dense layer under two names, a norm and a head, and a state that is added."""
    h = nn.Dense(8, activation="tanh")(p.body, x)
    h = nn.Dense(8, activation="tanh")(p.again, h)
    gamma = p.norm.param("gamma", h.shape, init.One())
    h = gamma * h + p.norm.state("shift", h.shape, init.Constant(0.1))
    return nn.Dense(3)(p.head, h)


def tied_loss(params: Any, x: Any, label: Any) -> Any:
    return -jax.nn.log_softmax(tied_net(params, x))[label]


def tied_mean_loss(params: Any, xs: Any, labels: Any) -> Any:
    return jnp.mean(jax.vmap(tied_loss, (None, 0, 0))(params, xs, labels))


class Case:
    """A net with its losses and parameters; all leaves are random, so no gradient is zero."""

    def __init__(self, net: Any, loss: Any, mean_loss: Any, ties: dict[str, str] | None) -> None:
        self.net, self.loss, self.mean_loss = net, loss, mean_loss
        rules: Any = {".*gamma": init.Uniform(1), ".*": init.Normal(0.5)}
        self.params = jax.jit(lambda key: pt.init(net, key, XS[0], ties=ties, rules=rules))(
            jax.random.key(3)
        )
        self.trained = pt.select(self.params, kind="param")
        self.grad = jax.jit(pt.grad(mean_loss))

    @functools.cached_property
    def grads(self) -> Any:
        return self.grad(self.params, XS, YS)

    @functools.cached_property
    def each(self) -> list[dict[str, np.ndarray]]:
        """The gradients of the single examples."""
        grad = jax.jit(jax.grad(self.loss))
        return [named(grad(self.params, x, y)) for x, y in zip(XS, YS, strict=True)]


@functools.cache
def plain() -> Case:
    return Case(net, loss, mean_loss, None)


@functools.cache
def tied() -> Case:
    return Case(tied_net, tied_loss, tied_mean_loss, {"again": "body"})


@pytest.fixture(params=[plain, tied])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


def named(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in pt.collect(tree).items()}


def same(a: Any, b: Any) -> None:
    """Fails unless two trees have the same structure and bitwise equal leaves."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, leaf in named(a).items():
        other = named(b)[name]
        assert leaf.dtype == other.dtype and leaf.tobytes() == other.tobytes(), name


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, leaf in named(a).items():
        np.testing.assert_allclose(leaf, named(b)[name], rtol, atol, err_msg=name)


def updates(tx: Any, case: Case, steps: int = 1) -> Any:
    """Returns an optimiser's last update after some steps with the same gradients."""
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(case.trained)
        for _ in range(steps):
            moves, state = tx.update(case.grads, state, case.trained)
    assert jax.tree.structure(moves) == jax.tree.structure(case.trained)
    return moves


def mixed(case: Case, pattern: str, yes: Any, no: Any) -> Any:
    """Returns the leaves of ``yes`` where names match, and of ``no`` elsewhere."""
    return pt.merge(pt.select(yes, pattern), pt.partition(no, pattern)[1])


# Optimisers


def test_decay_some(case: Case) -> None:
    tx = recipes.decay_some(LR, 0.3, case.trained)
    adam = updates(optax.adam(LR), case)
    decayed = jax.tree.map(lambda u, p: u - LR * 0.3 * p, adam, case.trained)
    moves = updates(tx, case)
    close(moves, mixed(case, ".*weight", decayed, adam))
    same(pt.partition(moves, ".*weight")[1], pt.partition(adam, ".*weight")[1])


def test_per_group(case: Case) -> None:
    txs = {"slow": optax.sgd(LR), "fast": optax.adam(LR)}
    tx = recipes.per_group(txs, case.trained, {"head.*": "fast", ".*": "slow"})
    slow, fast = updates(txs["slow"], case, 2), updates(txs["fast"], case, 2)
    same(updates(tx, case, 2), mixed(case, "head.*", fast, slow))


def test_freeze_in_optimiser(case: Case) -> None:
    tx = recipes.freeze_in_optimiser(optax.adam(LR), case.trained, "head.*")
    moves = updates(tx, case, 2)
    same(
        moves,
        mixed(
            case, "head.*", jax.tree.map(jnp.zeros_like, case.trained), updates(optax.adam(LR), case, 2)
        ),
    )
    moved = optax.apply_updates(case.trained, moves)
    same(pt.select(moved, "head.*"), pt.select(case.params, "head.*"))
    slots = jax.tree.leaves(tx.init(case.trained))
    assert sum(a.size for a in slots) < 2 * pt.count(case.trained)


@pytest.mark.parametrize("pattern", ["head.*", None])
def test_fine_tune_step(case: Case, pattern: str | None) -> None:
    tx = optax.sgd(LR, momentum=0.9)
    start = pt.select(case.params, pattern, kind="param")
    state = tx.init(start)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(start))
    step = jax.jit(recipes.fine_tune_step(case.mean_loss, tx, pattern))
    params = case.params
    for _ in range(2):
        params, state, value = step(params, state, XS, YS)
    assert step._cache_size() == 1
    value_and_grad = jax.jit(jax.value_and_grad(case.mean_loss))
    hand, trace = named(case.params), dict.fromkeys(named(start), 0)
    for _ in range(2):
        expected, tree = value_and_grad(pt.replace(case.params, hand), XS, YS)
        grads = named(tree)
        for name in trace:
            trace[name] = grads[name] + np.float32(0.9) * trace[name]
            hand[name] = hand[name] - np.float32(LR) * trace[name]
    close(params, pt.replace(case.params, hand))
    np.testing.assert_allclose(value, expected, 1e-5)
    same(
        pt.partition(params, pattern, kind="param")[1],
        pt.partition(case.params, pattern, kind="param")[1],
    )
    assert pt.ties(params) == pt.ties(case.params)


def test_lr_mult(case: Case) -> None:
    rules = {"head_bias": 10.0, "head.*": 0.0, ".*bias": 2.0}
    sgd = updates(optax.sgd(LR), case)
    mult = {"head_bias": 10, "head_weight": 0, "body_bias": 2, "body_weight": 1, "norm_gamma": 1}
    expected = pt.map_named(lambda name, leaf: leaf * np.float32(mult[name]), sgd)
    same(updates(optax.chain(optax.sgd(LR), recipes.lr_mult(rules)), case), expected)


def test_lr_mult_goes_with_groups_and_other_optimisers(case: Case) -> None:
    adam = optax.chain(optax.adam(LR), recipes.lr_mult({"body.*": 0.5}))
    tx = recipes.freeze_in_optimiser(adam, case.trained, "head.*")
    moves, plain = updates(tx, case, 2), updates(optax.adam(LR), case, 2)
    same(pt.select(moves, "body.*"), pt.select(jax.tree.map(lambda u: u / 2, plain), "body.*"))
    same(pt.select(moves, "norm.*"), pt.select(plain, "norm.*"))
    assert not any(leaf.any() for leaf in named(pt.select(moves, "head.*")).values())


def test_wd_mult_with_lr_mult_is_gluons_rule(case: Case) -> None:
    tx = optax.chain(
        recipes.wd_mult(0.3, {".*bias": 0.0, "head.*": 2.0}),
        optax.sgd(LR),
        recipes.lr_mult({"head.*": 3.0}),
    )
    wd = {"head_bias": 0, "head_weight": 2, "body_bias": 0, "body_weight": 1, "norm_gamma": 1}
    grads, params = named(case.grads), named(case.trained)
    for name, leaf in named(updates(tx, case)).items():
        lr = LR * (3 if name.startswith("head") else 1)
        expected = -lr * (grads[name] + 0.3 * wd[name] * params[name])
        np.testing.assert_allclose(leaf, expected, 1e-5, 1e-7, err_msg=name)


def test_multipliers_that_match_nothing_are_errors(case: Case) -> None:
    for tx in (recipes.lr_mult({"haed.*": 2.0}), recipes.wd_mult(0.1, {"haed.*": 2.0})):
        with pytest.raises(pt.RuleError, match="haed"):
            tx.init(case.trained)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clip_group(case: Case, factor: float) -> None:
    head = named(pt.select(case.grads, "head.*"))
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in head.values()))
    clipped = updates(recipes.clip_group(factor * norm, case.trained, "head.*"), case)
    scale = np.float32(min(1, factor))
    close(
        pt.select(clipped, "head.*"),
        pt.replace(pt.select(case.grads, "head.*"), {k: scale * v for k, v in head.items()}),
    )
    same(pt.partition(clipped, "head.*")[1], pt.partition(case.grads, "head.*")[1])


def test_every(case: Case) -> None:
    tx = recipes.every(3, optax.sgd(LR))
    grad = case.grad
    with jax.numpy_dtype_promotion("standard"):
        state, params = tx.init(case.trained), case.trained
        for i in range(3):
            same(params, case.trained)
            part = slice(2 * i, 2 * i + 2)
            moves, state = tx.update(grad(case.params, XS[part], YS[part]), state, params)
            params = optax.apply_updates(params, moves)
    expected = optax.apply_updates(case.trained, updates(optax.sgd(LR), case))  # on the full batch
    close(params, expected)


# Gradients


def test_grad_req_null(case: Case) -> None:
    grads = jax.jit(recipes.grad_req_null(case.mean_loss, "body.*"))(case.params, XS, YS)
    close(grads, pt.partition(case.grads, "body.*")[1])
    assert not pt.collect(grads, "body.*|.*shift")


def test_grad_req_null_of_one_name_of_a_tie_leaves_the_leaf_out() -> None:
    case = tied()
    grads = jax.eval_shape(recipes.grad_req_null(case.mean_loss, "again.*"), case.params, XS, YS)
    assert list(pt.collect(grads)) == ["norm_gamma", "head_weight", "head_bias"]


def test_grad_req_add_is_the_gradient_of_the_sum(case: Case) -> None:
    xs, ys = XS.reshape(3, 2, 8), YS.reshape(3, 2)
    total = jax.jit(lambda p: recipes.grad_req_add(case.mean_loss, p, xs, ys))(case.params)
    summed = jax.jit(
        jax.grad(lambda p: sum(case.mean_loss(p, x, y) for x, y in zip(xs, ys, strict=True)) * 1.0)
    )(case.params)
    close(total, pt.select(summed, kind="param"))


def test_norms_by_name(case: Case) -> None:
    norms = jax.jit(lambda g: recipes.norms_by_name(g))(case.grads)
    assert list(norms) == list(pt.collect(case.grads))
    for name, leaf in named(case.grads).items():
        np.testing.assert_allclose(norms[name], np.sqrt((leaf**2).sum()), 1e-5)


def test_example_norms(case: Case) -> None:
    groups = ["body.*", ".*weight"]
    norms = jax.jit(lambda p: recipes.example_norms(case.loss, p, groups, XS, YS))(case.params)
    assert list(norms) == sorted(groups)
    for i, grads in enumerate(case.each):
        body = sum((grads[f"body_{k}"] ** 2).sum() for k in ("weight", "bias"))
        weights = sum((grads[f"{k}_weight"] ** 2).sum() for k in ("body", "head"))
        np.testing.assert_allclose(norms["body.*"][i], np.sqrt(body), 1e-5)
        np.testing.assert_allclose(norms[".*weight"][i], np.sqrt(weights), 1e-5)


def test_hvp(case: Case) -> None:
    pattern = "body_weight|norm_gamma"
    chosen, rest = pt.partition(case.params, pattern)
    flat, restore = jax.flatten_util.ravel_pytree(chosen)
    direction = np.random.default_rng(1).normal(size=flat.shape).astype(np.float32)

    @jax.jit
    def both(v: Any) -> Any:
        hessian = jax.hessian(lambda v: case.mean_loss(pt.merge(restore(v), rest), XS, YS))(v)
        return recipes.hvp(case.mean_loss, case.params, pattern, restore(direction), XS, YS), hessian

    product, hessian = both(flat)
    close(product, restore(np.asarray(hessian) @ direction), 1e-4, 1e-5)


@pytest.mark.parametrize("pattern", [".*weight", None])
def test_fisher(case: Case, pattern: str | None) -> None:
    diagonal = jax.jit(lambda p: recipes.fisher(case.loss, p, pattern, XS, YS))(case.params)
    assert jax.tree.structure(diagonal) == jax.tree.structure(
        pt.select(case.params, pattern, kind="param")
    )
    loop = case.each
    for name, leaf in named(diagonal).items():
        expected = sum(grads[name].astype(np.float64) ** 2 for grads in loop) / len(loop)
        np.testing.assert_allclose(leaf, expected, 1e-4, 1e-7, err_msg=name)


# Parameters


def hand_inner(case: Case, params: Any, *batch: Any) -> Any:
    """Returns the parameters after an SGD step on the head, without partition or select."""
    leaves = pt.collect(params).to_dict()
    grads = pt.collect(jax.grad(case.mean_loss)(params, *batch)).to_dict()
    for name in ("head_weight", "head_bias"):
        leaves[name] = leaves[name] - LR * grads[name]
    return pt.replace(params, leaves)


def test_inner_step(case: Case) -> None:
    adapted, expected = jax.jit(
        lambda p: (
            recipes.inner_step(case.mean_loss, p, "head.*", LR, XS[:3], YS[:3]),
            hand_inner(case, p, XS[:3], YS[:3]),
        )
    )(case.params)
    close(adapted, expected)
    rest = pt.partition(case.params, "head.*")[1]
    same(pt.partition(adapted, "head.*")[1], rest)
    assert pt.ties(adapted) == pt.ties(case.params)


def test_inner_step_never_moves_state() -> None:
    case = tied()
    adapted = jax.jit(lambda p: recipes.inner_step(case.mean_loss, p, ".*", LR, XS, YS))(case.params)
    assert (adapted.body.weight != case.params.body.weight).all()
    same(pt.select(adapted, kind="state"), pt.select(case.params, kind="state"))


def test_the_outer_gradient_of_inner_step(case: Case) -> None:
    def ours(p: Any) -> Any:
        adapted = recipes.inner_step(case.mean_loss, p, "head.*", LR, XS[:3], YS[:3])
        return case.mean_loss(adapted, XS[3:], YS[3:])

    def by_hand(p: Any) -> Any:
        return case.mean_loss(hand_inner(case, p, XS[:3], YS[:3]), XS[3:], YS[3:])

    both = jax.jit(lambda p: (*jax.value_and_grad(ours)(p), jax.grad(by_hand)(p)))
    _, grads, expected = both(case.params)
    close(grads, expected)
    draw = np.random.default_rng(5)
    direction = jax.tree.map(lambda a: draw.normal(size=a.shape).astype(np.float32), case.params)
    slope = sum((leaf * named(direction)[name]).sum() for name, leaf in named(grads).items())
    ends = [
        both(jax.tree.map(lambda p, d, e=e: p + e * d, case.params, direction))[0]
        for e in (1e-2, -1e-2)
    ]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, slope, rtol=0.02, atol=2e-3)


def test_averages(case: Case) -> None:
    average = pt.select(case.params, "head.*|body_weight")
    size = len(jax.tree.leaves(average))
    params, expected = case.params, named(average)
    for _ in range(3):
        params = jax.tree.map(lambda leaf: leaf + 1, params)
        average = recipes.update_average(average, params, "head.*|body_weight", 0.9)
        expected = {name: 0.9 * leaf + 0.1 * named(params)[name] for name, leaf in expected.items()}
    assert len(jax.tree.leaves(average)) == size == 3
    merged = recipes.with_average(params, average)
    close(
        merged, pt.replace(params, {name: leaf.astype(np.float32) for name, leaf in expected.items()})
    )
    assert pt.ties(merged) == pt.ties(params)
    same(pt.select(merged, "norm.*"), pt.select(params, "norm.*"))


def products(jaxpr: Any) -> list[set[Any]]:
    """Returns the operand dtypes of every dot_general in a jaxpr, including nested ones."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append({var.aval.dtype for var in eqn.invars})
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


def test_mixed_precision() -> None:
    case = plain()
    seen: dict[str, Any] = {}

    def watched(p: Any, x: Any) -> Any:
        seen.update({name: leaf.dtype for name, leaf in pt.collect(p).items()})
        return net(p, x)

    half = recipes.mixed_precision(watched, "norm.*")

    def half_loss(params: Any) -> Any:
        logits = jax.vmap(half, (None, 0))(params, XS)
        assert logits.dtype == jnp.float32
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(6), YS])

    gradient = jax.jit(jax.grad(half_loss))
    grads = gradient(case.params)
    assert seen.pop("norm_gamma") == jnp.float32
    assert len(seen) == 4 and set(seen.values()) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    close(grads, case.grads, 0.1, 0.02)
    ran = products(jax.make_jaxpr(gradient)(case.params).jaxpr)
    assert len(ran) >= 4 and all(pair == {jnp.dtype(jnp.bfloat16)} for pair in ran)
    full = products(jax.make_jaxpr(lambda p: jax.grad(mean_loss)(p, XS, YS))(case.params).jaxpr)
    assert len(full) == len(ran) and all(pair == {jnp.dtype("float32")} for pair in full)


def test_mixed_precision_keeps_ties_and_structure() -> None:
    case = tied()

    def half_net(p: Any, x: Any) -> Any:
        assert p.body.weight is p.again.weight
        h = nn.Dense(8)(p.again, nn.Dense(8)(p.body, x))
        return nn.Dense(3)(p.head, h)

    half = recipes.mixed_precision(half_net, "norm.*")
    grads = jax.eval_shape(jax.grad(lambda p: jnp.sum(half(p, XS))), case.params)
    assert jax.tree.structure(grads) == jax.tree.structure(case.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_prune(case: Case) -> None:
    model, params = recipes.prune(case.net, case.params, ".*weight", 0.5)
    before = named(case.params)

    def check(params: Any) -> dict[str, np.ndarray]:
        leaves = named(pt.fold(params, dict(model.rules)))
        for name in ("body_weight", "head_weight"):
            least = np.abs(before[name]) <= np.median(np.abs(before[name]))
            assert (leaves[name] == 0).tolist() == least.tolist()
        return leaves

    plain = check(params)
    y = jax.vmap(model, (None, 0))(params, XS)
    again = jax.vmap(case.net, (None, 0))(pt.replace(case.params, plain), XS)
    np.testing.assert_allclose(y, again, 1e-5, 1e-6)
    trained = pt.grad(lambda p: jax.vmap(model, (None, 0))(p, XS).sum())(params)
    assert list(named(trained)) == [n for n in named(params) if not n.endswith(("mask", "shift"))]
    stepped = pt.replace(
        params, {n: named(params)[n] - np.float32(LR) * g for n, g in named(trained).items()}
    )
    moved = check(stepped)
    assert np.any(moved["body_weight"] != plain["body_weight"])


def test_new_head(case: Case) -> None:
    key = jax.random.key(9)
    tuned = recipes.new_head(case.params, key, "head.*|nothing")
    same(pt.partition(tuned, "head.*")[1], pt.partition(case.params, "head.*")[1])
    assert jax.tree.structure(tuned) == jax.tree.structure(case.params)
    rules: Any = {".*bias": init.Zero(), ".*weight": init.Normal(0.01)}
    fresh = pt.init(
        case.net, key, XS[0], ties={"again": "body"} if pt.ties(case.params) else None, rules=rules
    )
    same(pt.select(tuned, "head.*"), pt.select(fresh, "head.*"))
    assert np.asarray(recipes.new_head(case.params, key, "head.*", init.One()).head.weight).all()


@pytest.mark.parametrize("sequential", [False, True], ids=["by hand", "by use"])
def test_transplant(sequential: bool) -> None:
    """The new net has a wider head; a tie that the net does not make becomes two equal leaves."""
    shared = nn.Dense(8, activation="tanh")

    def of(units: int) -> nn.Sequential:
        again = shared if sequential else nn.Dense(8, activation="tanh")
        return nn.Sequential(shared, again, nn.Dense(units))

    key = jax.random.key(9)
    old = pt.init(of(3), jax.random.key(1), XS, ties=None if sequential else {"dense1": "dense0"})
    moved = recipes.transplant(old, of(7), key, "dense2.*", XS)
    fresh = pt.init(of(7), key, XS)
    assert jax.tree.structure(moved) == jax.tree.structure(fresh)
    assert pt.ties(moved) == (pt.ties(old) if sequential else {})
    same(pt.select(moved, "dense2.*"), pt.select(fresh, "dense2.*"))
    for layer in ("dense0", "dense1"):
        for leaf in ("weight", "bias"):
            assert np.array_equal(moved[layer][leaf], old[layer][leaf])


# All recipes


def functions() -> list[ast.FunctionDef]:
    tree = ast.parse(Path(recipes.__file__).read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def code_lines(node: ast.FunctionDef) -> int:
    """Returns the number of code lines of a function, without docstring, blank lines and comments."""
    source = Path(recipes.__file__).read_text().splitlines()
    first = node.body[0]
    doc = range(first.lineno, (first.end_lineno or 0) + 1) if ast.get_docstring(node) else range(0)
    lines = [n for n in range(node.lineno, (node.end_lineno or 0) + 1) if n not in doc]
    return sum(bool(source[n - 1].strip()) and not source[n - 1].strip().startswith("#") for n in lines)


DEMONSTRATION = {"net", "loss", "mean_loss", "moves", "gradients", "main", "title", "show"}
RECIPES = [node for node in functions() if node.name not in DEMONSTRATION]


@pytest.mark.parametrize("node", RECIPES, ids=lambda node: node.name)
def test_a_recipe_is_short_typed_and_says_when_to_use_it(node: ast.FunctionDef) -> None:
    assert code_lines(node) <= 10
    assert "Use it" in (ast.get_docstring(node) or "")
    assert node.returns and all(arg.annotation for arg in node.args.args)
    assert f"recipes.{node.name}(" in Path(__file__).read_text(), "no test calls it"


def test_the_counting_of_lines_counts() -> None:
    assert {node.name: code_lines(node) for node in functions()}["loss"] == 2
    assert {node.name: code_lines(node) for node in functions()}["main"] > 10
    assert len(RECIPES) == 26 and {node.name for node in functions()} >= DEMONSTRATION


def test_the_demonstration_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.numpy_dtype_promotion("standard"):
        params = pt.abstract(net, XS[0, :5])
        for name in ("moves", "gradients"):  # only traced: compiling takes seconds
            norms = jax.eval_shape(
                getattr(recipes, name), params, np.tile(XS[:4, :5], (2, 1)), np.zeros(8, np.int32)
            )
            assert {leaf.dtype for leaf in jax.tree.leaves(norms)} == {jnp.dtype("float32")}
            few = {f"{name} here": {"norm": jnp.ones(())}}
            monkeypatch.setattr(recipes, name, lambda *_, few=few: few)
        recipes.main()
    out = capsys.readouterr().out
    assert "moves here" in out and "gradients here" in out and "bfloat16" in out
    assert float(out.split("loss ")[1].split()[0]) < 0.6


def test_an_ensemble_trains_each_member_as_if_alone() -> None:
    key, tx = jax.random.key(5), optax.sgd(LR)
    many = recipes.ensemble(net, key, 3, XS[0])
    step = jax.jit(recipes.ensemble_step(mean_loss, tx))
    after, _, values = step(many, jax.vmap(tx.init)(many), XS, YS)
    assert values.shape == (3,)
    members = pt.unstack(after, "")
    for i, one in enumerate(jax.random.split(key, 3)):
        alone = pt.init(net, one, XS[0])
        value, grads = jax.value_and_grad(mean_loss)(alone, XS, YS)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for name, leaf in pt.collect(alone).items():
            trained = leaf - LR * pt.collect(grads)[name]
            np.testing.assert_allclose(pt.collect(members[i])[name], trained, rtol=1e-4, atol=1e-6)


def test_a_frozen_encoder_drops_out_and_counts_but_does_not_learn() -> None:
    encoder = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5))
    model = recipes.frozen_encoder(encoder, nn.Dense(2))
    x = jax.random.normal(jax.random.key(1), (16, 5))
    params = pt.init(model, jax.random.key(0), x)

    def loss(trained: Any, rest: Any, key: Any) -> Any:
        y, new = pt.training(model)(pt.merge(trained, rest), x, key=key)
        return y.sum(), (y, new)

    trained, rest = pt.partition(params, kind="param")
    step = jax.jit(jax.grad(loss, has_aux=True))
    grads, (y, new) = step(trained, rest, jax.random.key(2))
    _, (other, _) = step(trained, rest, jax.random.key(3))
    assert not np.any(grads.encoder.dense0.weight)
    assert np.any(grads.head.weight)
    assert np.any(new.encoder.batchnorm0.running_mean != params.encoder.batchnorm0.running_mean)
    assert np.any(y != other)  # dropout drops


def test_experts_equal_the_loop_over_them_and_drop_out_in_training() -> None:
    expert = nn.Sequential(nn.Dense(8, activation="relu"), nn.Dropout(0.5), nn.Dense(3))
    net = recipes.Experts(expert, 4)
    x = jax.random.normal(jax.random.key(1), (16, 5))
    params = net.init(jax.random.key(0), x)
    gate = jax.nn.softmax(nn.Dense(4)(params.gate, x))
    experts = pt.unstack(params, "experts").experts
    want = jnp.stack([gate[:, i : i + 1] * expert(experts[str(i)], x) for i in range(4)]).sum(0)
    np.testing.assert_allclose(net(params, x), want, rtol=1e-5, atol=1e-6)
    y, _ = pt.training(net)(params, x, key=jax.random.key(2))
    other, _ = pt.training(net)(params, x, key=jax.random.key(3))
    assert np.any(y != other)


def test_checkpointed_keeps_dropout_and_statistics() -> None:
    block = nn.Sequential(nn.Dense(5), nn.BatchNorm(), nn.Dropout(0.5))
    x = jax.random.normal(jax.random.key(1), (16, 5))

    def plain(p: Any, x: Any) -> Any:
        return block(p.b, block(p.a, x))

    def saving(p: Any, x: Any) -> Any:
        return recipes.checkpointed(block, p, "b", recipes.checkpointed(block, p, "a", x))

    params = pt.init(saving, jax.random.key(0), x)
    assert jax.tree.structure(params) == jax.tree.structure(pt.init(plain, jax.random.key(0), x))
    np.testing.assert_array_equal(saving(params, x), plain(params, x))

    def loss(model: Any, trained: Any, rest: Any) -> Any:
        y, new = pt.training(model)(pt.merge(trained, rest), x, key=jax.random.key(2))
        return (y**2).sum(), (y, new)

    parts = pt.partition(params, kind="param")
    grads, (y, new) = jax.jit(jax.grad(functools.partial(loss, saving), has_aux=True))(*parts)
    assert np.any(y == 0)
    for name in ("a", "b"):
        assert np.any(new[name].batchnorm0.running_mean != 0)
        assert np.any(grads[name].dense0.weight)
    want = pt.training(plain)(params, x, key=jax.random.key(2))[1]
    np.testing.assert_allclose(
        new.a.batchnorm0.running_mean, want.a.batchnorm0.running_mean, rtol=1e-5, atol=1e-6
    )
    text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, saving), has_aux=True))(*parts))
    assert "checkpoint" in text or "remat" in text


def test_a_resnet_is_fine_tuned_with_frozen_statistics() -> None:
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    net, tuned = recipes.resnet(4, 3), recipes.resnet(4, 3, frozen_statistics=True)
    params = net.init(jax.random.key(0), x)
    _, params = pt.training(net)(params, x, key=jax.random.key(2))
    assert np.any(params.batchnorm0.running_mean != 0)
    y, new = pt.training(tuned)(params, x, key=jax.random.key(3))
    other, _ = pt.training(tuned)(params, x, key=jax.random.key(4))
    for leaf, old in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, old)
    assert np.any(y != other)  # dropout drops
    np.testing.assert_allclose(tuned(params, x), net(params, x), rtol=1e-5)
    grads = pt.grad(lambda p: pt.training(tuned)(p, x, key=jax.random.key(3))[0].sum())(params)
    assert np.any(grads.head.weight)


def test_mixed_precision_keeps_training() -> None:
    net = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5))
    half = recipes.mixed_precision(net, "batchnorm.*")
    x = jax.random.normal(jax.random.key(1), (16, 5))
    params = pt.init(half, jax.random.key(0), x)
    y, new = pt.training(half)(params, x, key=jax.random.key(2))
    assert np.any(y == 0)
    assert np.any(new.batchnorm0.running_mean != 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
