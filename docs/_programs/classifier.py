"""A classifier in paramtree, which several pages show next to that of another library."""

# define
from functools import partial

import jax
import optax
import paramtree as pt
from paramtree import nn

from batch import labels, tokens, x


class Net(nn.Layer):
    rate: float = 0.0

    def __call__(self, p, x):
        h = nn.Dense(16, use_bias=False)(p.hidden, x)
        h = jax.nn.relu(nn.BatchNorm()(p.norm, h))
        h = nn.Dropout(self.rate)(p.dropout, h)
        return nn.Dense(3)(p.head, h)


# initialise
net = Net()
params = pt.init(net, jax.random.key(0), x)

# call
y = net(params, x)

# read
weight = params.hidden.weight  # (out, in)
names = list(pt.collect(params))

# train
tx = optax.adam(1e-2)


@partial(jax.jit, static_argnames="pattern")
def step(params, slots, x, labels, key, pattern=".*"):
    trained, rest = pt.partition(params, pattern, kind="param")

    def loss(trained):
        params = pt.merge(trained, rest)
        logits, params = pt.training(net)(params, x, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        )
        new = pt.partition(params, pattern, kind="param")[1]
        return losses.mean(), new

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, new), grads = value_and_grad(trained)
    updates, slots = tx.update(grads, slots, trained)
    trained = optax.apply_updates(trained, updates)
    return pt.merge(trained, new), slots, value


def train(params, pattern=".*", steps=5):
    slots = tx.init(pt.select(params, pattern, kind="param"))
    losses = []
    for i in range(steps):
        params, slots, value = step(
            params, slots, x, labels, jax.random.key(i), pattern
        )
        losses.append(value)
    return params, losses


# freeze
def train_head(params):
    return train(params, "head_.*")


# tie
def language(p, tokens):
    h = nn.Embedding(11, 8)(p.embed, tokens)
    h = nn.Dense(8, "tanh", flatten=False)(p.body, h)
    decode = nn.Dense(11, use_bias=False, flatten=False)
    return decode(p.decoder, h)


tied = pt.init(
    language,
    jax.random.key(0),
    tokens,
    ties={"decoder/weight": "embed/weight"},
)


# save
def save_and_load(path, params):
    pt.save(path, params)
    return pt.load(path, like=params)


# end
