"""Recipes: what people do to parameters by name, in at most ten lines each.

Optimisers are optax's and derivatives are jax's; the names come from paramtree. Every recipe is a
function to copy, and most of them work on any other pytree as well. Patterns are regular expressions
that match whole names; a table gives each name the value of the first pattern that matches it.

Run it with ``python examples/recipes.py``; it needs optax.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

Model = Callable[..., Any]  # (params, x) -> y
Loss = Callable[..., Any]  # (params, *batch) -> scalar
Rules = Mapping[Any, Any]  # {pattern: value}
Tx: TypeAlias = optax.GradientTransformationExtraArgs

# Optimisers by name


def decay_some(lr: float, decay: float, params: Any, pattern: str = ".*weight") -> Tx:
    """Returns AdamW that decays only the matching parameters.

    Use it to keep biases and the scales of norms out of weight decay.
    """
    return optax.adamw(lr, weight_decay=decay, mask=pt.mask(params, pattern))


def per_group(txs: Mapping[str, Any], params: Any, rules: Rules) -> Tx:
    """Returns an optimiser with a group of parameters for each label; ``rules`` gives the labels.

    Use it for a slow body and a fast head, or for Adam here and SGD there.
    """
    return optax.multi_transform(txs, pt.labels(params, rules))


def freeze_in_optimiser(tx: Any, params: Any, pattern: str) -> Tx:
    """Returns an optimiser that does not move the matching parameters and has no state for them.

    Use it if the training step is given and takes any optimiser. Their gradients are still
    computed: ``fine_tune_step`` saves that too.
    """
    groups = {"train": tx, "freeze": optax.set_to_zero()}
    return optax.multi_transform(groups, pt.labels(params, {pattern: "freeze"}, default="train"))


def fine_tune_step(loss: Loss, tx: Any, pattern: str | None = None) -> Callable[..., Any]:
    """Returns a step ``(params, state, *batch) -> (params, state, value)`` that trains what matches.

    Use it to fine-tune: all else costs no backward pass and no optimiser state. With no pattern it
    trains all that is not state. It starts from ``tx.init(pt.select(params, pattern, kind="param"))``.
    """

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        trained, frozen = pt.partition(params, pattern, kind="param")
        value, grads = jax.value_and_grad(lambda p: loss(pt.merge(p, frozen), *batch))(trained)
        updates, state = tx.update(grads, state, trained)
        return pt.merge(optax.apply_updates(trained, updates), frozen), state, value

    return step


def lr_mult(rules: Rules) -> Tx:
    """Returns a transformation that multiplies learning rates by name, as Gluon's ``lr_mult``.

    Use it after an optimiser: ``optax.chain(optax.adam(1e-3), lr_mult({"body_.*": 0.1}))``. What no
    pattern matches keeps its rate.
    """
    scales = {mult: optax.scale(mult) for mult in {1.0, *rules.values()}}
    return optax.multi_transform(scales, lambda tree: pt.labels(tree, rules, default=1.0))


def wd_mult(decay: float, rules: Rules) -> Tx:
    """Returns weight decay with multipliers by name, as Gluon's ``wd`` and ``wd_mult``.

    Use it before an optimiser: ``optax.chain(wd_mult(1e-4, {".*bias": 0.0}), optax.sgd(0.1))``. What
    no pattern matches decays by ``decay``.
    """
    decays = {mult: optax.add_decayed_weights(decay * mult) for mult in {1.0, *rules.values()}}
    return optax.multi_transform(decays, lambda tree: pt.labels(tree, rules, default=1.0))


def clip_group(max_norm: float, params: Any, pattern: str) -> Any:
    """Returns a transformation that clips the joint norm of the matching gradients, and no others.

    Use it before an optimiser where one group, say the recurrent weights, has gradients that explode.
    """
    return optax.masked(optax.clip_by_global_norm(max_norm), pt.mask(params, pattern))


def every(k: int, tx: Any) -> Any:
    """Returns an optimiser that moves once in ``k`` calls, by the mean of their gradients.

    Use it to accumulate if the micro-batches come one by one; else ``grad_req_add`` does with less.
    """
    return optax.MultiSteps(tx, every_k_schedule=k).gradient_transformation()


# Gradients by name


def grad_req_null(loss: Loss, pattern: str) -> Callable[..., Any]:
    """Returns a gradient function that leaves the matching parameters out, as ``grad_req="null"``.

    Use it if it is easier to say what is fixed; ``pt.grad(loss, wrt=pattern)`` says what is not.
    """

    def gradient(params: Any, *batch: Any) -> Any:
        fixed, free = pt.partition(params, pattern)
        return pt.grad(lambda p: loss(pt.merge(p, fixed), *batch))(free)

    return gradient


def grad_req_add(loss: Loss, params: Any, *batches: Any) -> Any:
    """Returns the sum of the gradients over micro-batches, as ``grad_req="add"``.

    Use it if a whole batch does not fit: it holds the gradients of one micro-batch and their sum.
    The arrays of ``batches`` have the micro-batches along their first axis.
    """

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return optax.tree.add(total, pt.grad(loss)(params, *batch)), None

    shapes = jax.eval_shape(pt.grad(loss), params, *(batch[0] for batch in batches))
    return jax.lax.scan(add, optax.tree.zeros_like(shapes), batches)[0]


def norms_by_name(grads: Any) -> pt.ParamTree:
    """Returns the norm of each leaf under its full name.

    Use it inside a jitted step to log gradients, updates or parameters; ``.to_dict()`` is a dict.
    """
    return jax.tree.map(jnp.linalg.norm, pt.collect(grads))


def example_norms(loss: Loss, params: Any, groups: Sequence[str], *batch: Any) -> dict[str, Any]:
    """Returns, for each pattern, the joint norm of its gradients for each example of a batch.

    Use it to find outliers, or to choose a clipping norm. ``loss`` takes one example.
    """

    def norms(*example: Any) -> dict[str, Any]:
        grads = pt.grad(loss)(params, *example)
        return {group: optax.tree.norm(pt.select(grads, group)) for group in groups}

    return jax.vmap(norms)(*batch)


def hvp(loss: Loss, params: Any, pattern: str, direction: Any, *batch: Any) -> Any:
    """Returns the product of a direction and the Hessian of the loss by the matching parameters.

    Use it for curvature, for its largest eigenvalues, or in conjugate gradients. The direction and
    the product are like ``pt.select(params, pattern)``.
    """
    chosen, rest = pt.partition(params, pattern)
    gradient = jax.grad(lambda p: loss(pt.merge(p, rest), *batch))
    return jax.jvp(gradient, (chosen,), (direction,))[1]


def fisher(log_likelihood: Loss, params: Any, pattern: str | None, *batch: Any) -> Any:
    """Returns the diagonal of the empirical Fisher information of the matching parameters.

    Use it to weigh parameters, as in elastic weight consolidation or pruning. It is the mean over a
    batch of the squared gradients; ``log_likelihood`` takes one example, and a loss that is minus it
    will do. With no pattern it is that of all that is not state.
    """
    gradient = pt.grad(log_likelihood, wrt=pattern)
    grads = jax.vmap(lambda *example: gradient(params, *example))(*batch)
    return jax.tree.map(lambda g: jnp.mean(g**2, axis=0), grads)


# Parameters by name


def inner_step(loss: Loss, params: Any, pattern: str, lr: float, *batch: Any) -> Any:
    """Returns the parameters after one SGD step on the matching ones, as in MAML's inner loop.

    Use it to adapt to a task, and differentiate through it: the outer loss of the result has a
    gradient by all of ``params``, the adapted ones and the others.
    """
    slow, rest = pt.partition(params, pattern, kind="param")
    grads = pt.grad(lambda p: loss(pt.merge(p, rest), *batch))(slow)
    return pt.merge(optax.tree.add_scale(slow, -lr, grads), rest)


def update_average(average: Any, params: Any, pattern: str, decay: float = 0.999) -> Any:
    """Returns the exponential moving average of the matching leaves, one step on.

    Use it after each training step. It starts as ``pt.select(params, pattern)``; the other leaves
    take no memory.
    """
    return optax.incremental_update(pt.select(params, pattern), average, 1 - decay)


def with_average(params: Any, average: Any) -> Any:
    """Returns the parameters with those that are averaged in place of their own.

    Use it to evaluate and to export.
    """
    return pt.replace(params, pt.collect(average).to_dict())


def mixed_precision(net: Model, keep: str, dtype: Any = jnp.bfloat16) -> Model:
    """Returns a model that computes in another dtype, but for the parameters that ``keep`` matches.

    Use it in the loss: the parameters, their gradients and the output stay float32, and copies in
    ``dtype`` are made for one call. Norms, as a rule, are to be kept.
    """

    def in_dtype(params: Any, x: jax.Array) -> Any:
        return net(pt.cast(params, {keep: None, ".*": dtype}), x.astype(dtype)).astype(jnp.float32)

    return in_dtype


def ensemble(net: Model, key: jax.Array, n: int, *inputs: Any) -> Any:
    """Returns n sets of parameters in one tree: every leaf has a first axis of size n.

    Use it for uncertainty, or to try seeds at the price of one. Member i is what ``pt.init`` gives
    for key i of ``jax.random.split(key, n)``; ``pt.unstack`` takes the members apart.
    """
    return jax.vmap(lambda key: pt.init(net, key, *inputs))(jax.random.split(key, n))


def ensemble_step(loss: Loss, tx: Any) -> Callable[..., Any]:
    """Returns a step ``(params, states, *batch) -> (params, states, values)`` that trains each member.

    Use it on what ``ensemble`` gives; the states start from ``jax.vmap(tx.init)(params)``.
    """

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return lambda params, states, *batch: jax.vmap(step, (0, 0, *(None for _ in batch)))(
        params, states, *batch
    )


def new_head(params: Any, key: jax.Array, pattern: str, initializer: Any = None) -> Any:
    """Returns the parameters with the weights that match drawn anew and the biases that match zero.

    Use it to fine-tune from a trained net. Each leaf gets what ``pt.init`` gives it with this key.
    """
    biases = f"(?=.*bias$)(?:{pattern})"  # a name that ends in bias and matches the pattern
    return pt.reinit(params, key, {biases: init.Zero(), pattern: initializer or init.Normal(0.01)})


def transplant(old: Any, net: Model, key: jax.Array, head: str, x: Any) -> pt.ParamTree:
    """Returns parameters for a net whose head is new, with all but the head from an old tree.

    Use it if the head has another shape, as for another number of classes. The ties are those of the
    new net.
    """
    body = pt.partition(old, head)[1]
    return pt.replace(pt.init(net, key, x), pt.collect(body, aliases=True).to_dict())


# A demonstration


def net(p: Any, x: jax.Array) -> Any:
    """A net for one example: a body, a norm that computes in float32, and a head."""
    h = nn.Dense(8, activation="tanh")(p.body, x)
    gamma = p.norm.param("gamma", h.shape, init.One())
    normed = gamma * jax.nn.standardize(h.astype(gamma.dtype))
    return nn.Dense(3)(p.head, normed.astype(h.dtype))


def loss(params: Any, x: jax.Array, label: jax.Array) -> Any:
    """Returns the cross-entropy of one example."""
    return -jax.nn.log_softmax(net(params, x))[label]


def mean_loss(params: Any, xs: jax.Array, labels: jax.Array) -> Any:
    """Returns the mean cross-entropy of a batch."""
    return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, xs, labels))


def moves(params: Any, xs: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Returns how far the optimisers of the recipes move each parameter in one step."""
    sgd, adam = optax.sgd(0.1), optax.adam(0.1)
    txs = {
        "weights that decay": decay_some(0.1, 0.1, params),
        "a slow body": per_group({"slow": sgd, "fast": adam}, params, {"body.*": "slow", ".*": "fast"}),
        "a frozen body": freeze_in_optimiser(adam, params, "body.*"),
        "lr_mult, wd_mult": optax.chain(wd_mult(0.1, {".*bias": 0.0}), sgd, lr_mult({"head.*": 10.0})),
        "a clipped head": optax.chain(clip_group(0.01, params, "head.*"), sgd),
        "one of 2 calls": every(2, sgd),
    }
    grads = jax.grad(mean_loss)(params, xs, labels)
    return {
        what: norms_by_name(tx.update(grads, tx.init(params), params)[0]) for what, tx in txs.items()
    }


def gradients(params: Any, xs: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Returns norms of what the recipes for gradients return."""
    halves = xs.reshape(2, 4, 5), labels.reshape(2, 4)
    head = pt.select(params, "head.*")
    trees = {
        "grad_req null": grad_req_null(mean_loss, "body.*")(params, xs, labels),
        "grad_req add": grad_req_add(mean_loss, params, *halves),
        "Hessian @ head": hvp(mean_loss, params, "head.*", head, xs, labels),
        "Fisher": fisher(loss, params, ".*weight", xs, labels),
        "an inner step": inner_step(mean_loss, params, "head.*", 0.5, xs, labels),
    }
    examples = example_norms(loss, params, ["body.*", "head.*"], xs, labels)
    return {what: norms_by_name(tree) for what, tree in trees.items()} | {"by example": examples}


def main() -> None:
    """Shows each recipe on a tiny net."""
    key = jax.random.key(0)
    xs, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    params = pt.init(net, key, xs[0])

    title("How far one step moves each parameter")
    for what, norms in jax.jit(moves)(params, xs, labels).items():
        show(what, norms)

    title("Norms by name, of gradients and the like")
    for what, norms in jax.jit(gradients)(params, xs, labels).items():
        show(what, norms)

    title("Training the head alone")
    show("at first", norms_by_name(params))
    tx = optax.adam(0.1)
    step = jax.jit(fine_tune_step(mean_loss, tx, "head.*"))
    state = tx.init(pt.select(params, "head.*"))
    average = pt.select(params, "head.*")
    for _ in range(20):
        params, state, value = step(params, state, xs, labels)
        average = update_average(average, params, "head.*", 0.9)
    show(f"loss {value:.2f}", norms_by_name(params))
    show("averaged", norms_by_name(with_average(params, average)))
    show("a new head", norms_by_name(new_head(params, key, "head.*")))
    show("transplanted", norms_by_name(transplant(params, net, key, "head.*", xs[0])))

    title("Mixed precision")
    for what, model in {"float32": net, "bfloat16": mixed_precision(net, "norm.*")}.items():
        print(f"{what:18} {jax.jit(model)(params, xs[0])}")


def title(text: str) -> None:
    """Prints a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


def show(what: str, norms: Any) -> None:
    """Prints a line of named norms."""
    shown = (
        f"{name} {np.array2string(norm, precision=2)}" for name, norm in jax.device_get(norms).items()
    )
    print(f"{what:18} {'  '.join(shown)}")


if __name__ == "__main__":
    main()
