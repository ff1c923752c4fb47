"""Recipes: common operations on parameters by name, in at most ten lines each.

Optimisers are optax's, derivatives are jax's, and names come from paramtree. Each recipe is a function
to copy; most work on any other pytree too. A pattern is a regular expression that matches a full name;
a rule table gives each name the value of the first pattern that matches it.

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
from paramtree.parametrizations import Masked

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

    Use it for a slow body and a fast head, or to mix Adam and SGD.
    """
    return optax.multi_transform(txs, pt.labels(params, rules))


def freeze_in_optimiser(tx: Any, params: Any, pattern: str) -> Tx:
    """Returns an optimiser that freezes the matching parameters and keeps no state for them.

    Use it if you cannot change the training step. It still computes their gradients;
    ``fine_tune_step`` does not.
    """
    groups = {"train": tx, "freeze": optax.set_to_zero()}
    return optax.multi_transform(groups, pt.labels(params, {pattern: "freeze"}, default="train"))


def fine_tune_step(loss: Loss, tx: Any, pattern: str | None = None) -> Callable[..., Any]:
    """Returns a step ``(params, state, *batch) -> (params, state, value)`` for the matching parameters.

    Use it to fine-tune: other leaves cost no backward pass and no optimiser state. No pattern trains
    every leaf of kind "param". Start from ``tx.init(pt.select(params, pattern, kind="param"))``.
    """

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        trained, frozen = pt.partition(params, pattern, kind="param")
        value, grads = jax.value_and_grad(lambda p: loss(pt.merge(p, frozen), *batch))(trained)
        updates, state = tx.update(grads, state, trained)
        return pt.merge(optax.apply_updates(trained, updates), frozen), state, value

    return step


def lr_mult(rules: Rules) -> Tx:
    """Returns a transformation that multiplies learning rates by name, like Gluon's ``lr_mult``.

    Use it after an optimiser: ``optax.chain(optax.adam(1e-3), lr_mult({"body_.*": 0.1}))``. The default
    multiplier is 1.
    """
    scales = {mult: optax.scale(mult) for mult in {1.0, *rules.values()}}
    return optax.multi_transform(scales, lambda tree: pt.labels(tree, rules, default=1.0))


def wd_mult(decay: float, rules: Rules) -> Tx:
    """Returns weight decay with multipliers by name, like Gluon's ``wd`` and ``wd_mult``.

    Use it before an optimiser: ``optax.chain(wd_mult(1e-4, {".*bias": 0.0}), optax.sgd(0.1))``. The
    default multiplier is 1.
    """
    decays = {mult: optax.add_decayed_weights(decay * mult) for mult in {1.0, *rules.values()}}
    return optax.multi_transform(decays, lambda tree: pt.labels(tree, rules, default=1.0))


def clip_group(max_norm: float, params: Any, pattern: str) -> Any:
    """Returns a transformation that clips the global norm of the matching gradients only.

    Use it before an optimiser if the gradients of one group, such as recurrent weights, explode.
    """
    return optax.masked(optax.clip_by_global_norm(max_norm), pt.mask(params, pattern))


def every(k: int, tx: Any) -> Any:
    """Returns an optimiser that steps once every ``k`` calls, with the mean of their gradients.

    Use it to accumulate if micro-batches arrive one by one; otherwise ``grad_req_add`` needs less.
    """
    return optax.MultiSteps(tx, every_k_schedule=k).gradient_transformation()


# Gradients by name


def grad_req_null(loss: Loss, pattern: str) -> Callable[..., Any]:
    """Returns a gradient function that omits the matching parameters, like ``grad_req="null"``.

    Use it to name the fixed parameters; ``pt.grad(loss, wrt=pattern)`` names the free ones.
    """

    def gradient(params: Any, *batch: Any) -> Any:
        fixed, free = pt.partition(params, pattern)
        return pt.grad(lambda p: loss(pt.merge(p, fixed), *batch))(free)

    return gradient


def grad_req_add(loss: Loss, params: Any, *batches: Any) -> Any:
    """Returns the sum of the gradients over micro-batches, like ``grad_req="add"``.

    Use it if a full batch does not fit in memory: it holds one micro-batch's gradients and the sum.
    The first axis of every array of ``batches`` is the micro-batch.
    """

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return optax.tree.add(total, pt.grad(loss)(params, *batch)), None

    shapes = jax.eval_shape(pt.grad(loss), params, *(batch[0] for batch in batches))
    return jax.lax.scan(add, optax.tree.zeros_like(shapes), batches)[0]


def norms_by_name(grads: Any) -> pt.ParamTree:
    """Returns the norm of each leaf under its full name.

    Use it inside a jitted step to log gradients, updates or parameters; ``.to_dict()`` makes a dict.
    """
    return jax.tree.map(jnp.linalg.norm, pt.collect(grads))


def example_norms(loss: Loss, params: Any, groups: Sequence[str], *batch: Any) -> dict[str, Any]:
    """Returns each pattern's global gradient norms, one for each example of a batch.

    Use it to find outliers, or to choose a clipping norm. ``loss`` takes one example.
    """

    def norms(*example: Any) -> dict[str, Any]:
        grads = pt.grad(loss)(params, *example)
        return {group: optax.tree.norm(pt.select(grads, group)) for group in groups}

    return jax.vmap(norms)(*batch)


def hvp(loss: Loss, params: Any, pattern: str, direction: Any, *batch: Any) -> Any:
    """Returns the product of the loss's Hessian in the matching parameters and a direction.

    Use it for curvature, its largest eigenvalues, or conjugate gradients. The direction and the product
    have the structure of ``pt.select(params, pattern)``.
    """
    chosen, rest = pt.partition(params, pattern)
    gradient = jax.grad(lambda p: loss(pt.merge(p, rest), *batch))
    return jax.jvp(gradient, (chosen,), (direction,))[1]


def fisher(log_likelihood: Loss, params: Any, pattern: str | None, *batch: Any) -> Any:
    """Returns the diagonal of the empirical Fisher information of the matching parameters.

    Use it to weigh parameters, as in elastic weight consolidation or pruning. It is the mean of squared
    gradients over a batch; ``log_likelihood`` takes one example and may be negated. No pattern means
    every leaf of kind "param".
    """
    gradient = pt.grad(log_likelihood, wrt=pattern)
    grads = jax.vmap(lambda *example: gradient(params, *example))(*batch)
    return jax.tree.map(lambda g: jnp.mean(g**2, axis=0), grads)


# Parameters by name


def inner_step(loss: Loss, params: Any, pattern: str, lr: float, *batch: Any) -> Any:
    """Returns the parameters after one SGD step on the matching ones, as in MAML's inner loop.

    Use it to adapt to a task and differentiate through the step: an outer loss of the result has
    gradients in all of ``params``, adapted or not.
    """
    slow, rest = pt.partition(params, pattern, kind="param")
    grads = pt.grad(lambda p: loss(pt.merge(p, rest), *batch))(slow)
    return pt.merge(optax.tree.add_scale(slow, -lr, grads), rest)


def update_average(average: Any, params: Any, pattern: str, decay: float = 0.999) -> Any:
    """Returns the updated exponential moving average of the matching leaves.

    Use it after each training step. Start from ``pt.select(params, pattern)``; other leaves take no
    memory.
    """
    return optax.incremental_update(pt.select(params, pattern), average, 1 - decay)


def with_average(params: Any, average: Any) -> Any:
    """Returns the parameters with the averaged leaves replaced by their averages.

    Use it to evaluate and to export.
    """
    return pt.replace(params, pt.collect(average).to_dict())


def mixed_precision(net: Model, keep: str, dtype: Any = jnp.bfloat16) -> Model:
    """Returns a model that computes in ``dtype``, except with the parameters that ``keep`` matches.

    Use it in the loss: parameters, gradients and output stay float32; each call casts copies to
    ``dtype``. Norms should usually be kept. State is never cast.
    """
    return nn.Compute(net, dtype, keep)


def prune(net: Model, params: Any, pattern: str, share: float) -> tuple[Model, Any]:
    """Returns a model and parameters in which a share of each matching weight is zero, and stays so.

    Use it on a trained net, then train on; to prune more, ``pt.fold`` and prune again. The model is
    ``pt.reparametrize(net, rules)``, with the entries of the least magnitude masked.
    """

    def largest(weight: Any) -> Any:
        return jnp.abs(weight) > jnp.quantile(jnp.abs(weight), share)

    rules = {pattern: Masked(largest)}
    return pt.reparametrize(net, rules), pt.expand(params, rules)


def ensemble(net: Model, key: jax.Array, n: int, *inputs: Any) -> Any:
    """Returns n sets of parameters in one tree: every leaf has a leading axis of size n.

    Use it for uncertainty, or to run n seeds at once. Member i equals ``pt.init`` with key i of
    ``jax.random.split(key, n)``; ``pt.unstack`` separates the members.
    """
    return jax.vmap(lambda key: pt.init(net, key, *inputs))(jax.random.split(key, n))


def ensemble_step(loss: Loss, tx: Any) -> Callable[..., Any]:
    """Returns a step ``(params, states, *batch) -> (params, states, values)`` that trains all members.

    Use it with ``ensemble``; start the states from ``jax.vmap(tx.init)(params)``.
    """

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return lambda params, states, *batch: jax.vmap(step, (0, 0, *(None for _ in batch)))(
        params, states, *batch
    )


def new_head(params: Any, key: jax.Array, pattern: str, initializer: Any = None) -> Any:
    """Returns the parameters with the matching weights redrawn and the matching biases zeroed.

    Use it to fine-tune a trained net. Each leaf gets the value that ``pt.init`` gives it for this key.
    """
    biases = f"(?=.*bias$)(?:{pattern})"  # a name that ends in bias and matches the pattern
    return pt.reinit(params, key, {biases: init.Zero(), pattern: initializer or init.Normal(0.01)})


def transplant(old: Any, net: Model, key: jax.Array, head: str, x: Any) -> pt.ParamTree:
    """Returns parameters for a net with a new head, and with all other leaves from an old tree.

    Use it if the head's shape changes, say for more classes. The ties are those of the new net.
    """
    body = pt.partition(old, head)[1]
    return pt.replace(pt.init(net, key, x), pt.collect(body, aliases=True).to_dict())


# Models in training


def frozen_encoder(encoder: Model, head: Model) -> Model:
    """Returns a model whose encoder gets no gradients, while its dropout and statistics go on.

    Use it to train a head on a trained encoder. The parts read ``p.encoder`` and ``p.head``.
    """

    def model(p: Any, x: jax.Array) -> Any:
        return head(p.head, encoder(jax.lax.stop_gradient(p.encoder), x))

    return model


class Experts(nn.Layer):
    """A mixture of experts: the outputs of ``n`` copies of a layer, weighted by a gate.

    Use it for capacity: the experts run side by side, each with parameters, dropout and statistics of
    its own, and ``pt.unstack(params, "experts")`` gives each its own names.
    """

    expert: nn.Layer
    n: int

    def __call__(self, p: Any, x: jax.Array) -> jax.Array:
        """Returns the weighted outputs, (batch, features)."""
        gate = jax.nn.softmax(nn.Dense(self.n)(p.gate, x))
        outputs = nn.Vmap(self.expert, self.n, in_axes=None)(p.experts, x)
        return jnp.einsum("bn,nbf->bf", gate, outputs)


def checkpointed(layer: Model, p: Any, name: str, x: jax.Array) -> Any:
    """Returns the output of a layer on the child ``name`` of a scope, recomputed in the backward pass.

    Use it for layers that keep state, such as batch normalization: what they write inside
    ``jax.checkpoint`` has to get out of it. Without state ``jax.checkpoint(layer)`` is enough,
    and for a stack of blocks ``nn.Repeat(block, n, remat=True)``.
    """
    if not p.training:
        return jax.checkpoint(layer)(p[name], x)
    y, new = jax.checkpoint(pt.training(layer))(p[name], x)
    p.update(name, new)
    return y


def resnet(width: int, classes: int, frozen_statistics: bool = False) -> nn.Sequential:
    """Returns a small residual net; frozen statistics are neither updated nor those of the batch.

    Use it to fine-tune on small batches. The parameters are the same either way, so a net is trained
    with one and fine-tuned with the other.
    """

    def conv() -> list[nn.Layer]:
        norm = nn.BatchNorm(use_global_stats=frozen_statistics)
        return [nn.Conv2D(width, 3, padding=1, use_bias=False), norm, nn.Activation("relu")]

    blocks = [nn.Residual(*conv()) for _ in range(2)]
    return nn.Sequential(
        *conv(), *blocks, nn.GlobalAvgPool2D(), nn.Dropout(0.5), head=nn.Dense(classes)
    )


# A demonstration


def net(p: Any, x: jax.Array) -> Any:
    """A net for one example: a body, a norm in float32, and a head."""
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
    """Returns how far each recipe's optimiser moves each parameter in one step."""
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
        label: norms_by_name(tx.update(grads, tx.init(params), params)[0]) for label, tx in txs.items()
    }


def gradients(params: Any, xs: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Returns the norms of the results of the gradient recipes."""
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
    return {label: norms_by_name(tree) for label, tree in trees.items()} | {"by example": examples}


def main() -> None:
    """Runs the recipes on a tiny net."""
    key = jax.random.key(0)
    xs, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    params = pt.init(net, key, xs[0])

    title("How far one step moves each parameter")
    for label, norms in jax.jit(moves)(params, xs, labels).items():
        show(label, norms)

    title("Norms of gradients, by name")
    for label, norms in jax.jit(gradients)(params, xs, labels).items():
        show(label, norms)

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
    for label, model in {"float32": net, "bfloat16": mixed_precision(net, "norm.*")}.items():
        print(f"{label:18} {jax.jit(model)(params, xs[0])}")

    title("Half of the weights")
    half, parts = prune(net, params, ".*weight", 0.5)
    print(f"{'pruned':18} {jax.jit(half)(parts, xs[0])}")


def title(text: str) -> None:
    """Prints a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


def show(label: str, norms: Any) -> None:
    """Prints a line of named norms."""
    cells = (
        f"{name} {np.array2string(norm, precision=2)}" for name, norm in jax.device_get(norms).items()
    )
    print(f"{label:18} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
