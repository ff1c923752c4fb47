"""A classifier in Haiku."""

# define
import pickle
from functools import partial

import haiku as hk
import jax
import optax

from batch import labels, tokens, x


def forward(x, train=False, rate=0.0):
    h = hk.Linear(16, with_bias=False, name="hidden")(x)
    h = hk.BatchNorm(True, True, 0.9, name="norm")(h, train)
    h = jax.nn.relu(h)
    if train:
        h = hk.dropout(hk.next_rng_key(), rate, h)
    return hk.Linear(3, name="head")(h)


# initialise
net = hk.transform_with_state(forward)
params, state = net.init(jax.random.key(0), x, train=True)

# call
y, _ = net.apply(params, state, None, x)

# read
weight = params["hidden"]["w"]  # (in, out)
names = [
    f"{module}_{name}"
    for module, name, _ in hk.data_structures.traverse(params)
]

# train
tx = optax.adam(1e-2)


def everything(module, name, value):
    return True


@partial(jax.jit, static_argnames="chosen")
def step(params, state, slots, x, labels, key, chosen=everything):
    partition = hk.data_structures.partition
    trained, rest = partition(chosen, params)

    def loss(trained):
        params = hk.data_structures.merge(trained, rest)
        logits, new = net.apply(params, state, key, x, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        )
        return losses.mean(), new

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, new), grads = value_and_grad(trained)
    updates, slots = tx.update(grads, slots, trained)
    trained = optax.apply_updates(trained, updates)
    params = hk.data_structures.merge(trained, rest)
    return params, new, slots, value


def train(params, state, chosen=everything, steps=5):
    slots = tx.init(hk.data_structures.filter(chosen, params))
    losses = []
    for i in range(steps):
        params, state, slots, value = step(
            params, state, slots, x, labels, jax.random.key(i), chosen
        )
        losses.append(value)
    return params, state, losses


# freeze
def in_head(module, name, value):
    return module == "head"


def train_head(params, state):
    return train(params, state, in_head)


# tie
@hk.without_apply_rng
@hk.transform
def language(tokens):
    embed = hk.Embed(11, 8, name="embed")
    h = jax.nn.tanh(hk.Linear(8, name="body")(embed(tokens)))
    return h @ embed.embeddings.T


tied = language.init(jax.random.key(0), tokens)


# save
def save_and_load(path, params, state):
    path.write_bytes(pickle.dumps((params, state)))
    return pickle.loads(path.read_bytes())


# end
