"""A classifier in Flax Linen."""

# define
from functools import partial

import flax.linen as nn
import jax
import optax
from flax import serialization

from batch import labels, tokens, x


class Net(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(16, use_bias=False, name="hidden")(x)
        h = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, name="norm"
        )(h)
        h = nn.relu(h)
        h = nn.Dropout(self.rate, deterministic=not train)(h)
        return nn.Dense(3, name="head")(h)


# initialise
net = Net()
variables = net.init(jax.random.key(0), x)
params, stats = variables["params"], variables["batch_stats"]

# call
y = net.apply({"params": params, "batch_stats": stats}, x)

# read
weight = params["hidden"]["kernel"]  # (in, out)
names = [
    "_".join(key.key for key in path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
]

# train
tx = optax.adam(1e-2)


@partial(jax.jit, static_argnums=0)
def step(tx, params, stats, slots, x, labels, key):
    def loss(params):
        logits, new = net.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        )
        return losses.mean(), new["batch_stats"]

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, new), grads = value_and_grad(params)
    updates, slots = tx.update(grads, slots, params)
    return optax.apply_updates(params, updates), new, slots, value


def train(params, stats, tx=tx, steps=5):
    slots, losses = tx.init(params), []
    for i in range(steps):
        params, stats, slots, value = step(
            tx, params, stats, slots, x, labels, jax.random.key(i)
        )
        losses.append(value)
    return params, stats, losses


# freeze
def group(path, leaf):
    return "train" if path[0].key == "head" else "freeze"


head_only = optax.multi_transform(
    {"train": tx, "freeze": optax.set_to_zero()},
    partial(jax.tree_util.tree_map_with_path, group),
)


def train_head(params, stats):
    return train(params, stats, head_only)


# tie
class Language(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        h = nn.tanh(nn.Dense(8, name="body")(embed(tokens)))
        return embed.attend(h)


language = Language()
tied = language.init(jax.random.key(0), tokens)


# save
def save_and_load(path, params, stats):
    tree = {"params": params, "batch_stats": stats}
    path.write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(tree, path.read_bytes())


# end
