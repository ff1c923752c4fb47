"""The programs of gluon_theirs.py in paramtree."""

# define
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

net = nn.Sequential(
    nn.Conv2D(8, 3, padding=1, activation="relu"),
    nn.BatchNorm(),
    nn.MaxPool2D(),
    nn.Conv2D(6, 3, strides=2, use_bias=False),
    nn.BatchNorm(scale=False),
    nn.Activation("relu"),
    nn.GlobalAvgPool2D(),
    nn.Flatten(),
    nn.Dense(10),
)

# recorded
GOLD = Path(__file__).resolve().parents[2] / "tests/data/gluon"
gold = dict(np.load(GOLD / "convbn.npz"))
x = gold["x"].transpose(0, 2, 3, 1)
labels = gold["labels"]
key = jax.random.key(0)

# initialise
params = pt.init(net, key, x, rules={".*weight": init.Xavier()})

# call
y = net(params, x)  # (N, H, W, C); nothing is made by a call

# read
weight = params[0].weight  # or params.conv0.weight
named = pt.collect(params, ".*weight")
bias = pt.collect(params)["dense0_bias"]

# set
rules = {"conv0_weight": init.Xavier(), ".*weight": init.Normal(0.01)}
params = pt.reinit(params, key, rules)
params = pt.replace(params, {"dense0_bias": params[8].bias + 1})

# train
tx = optax.sgd(0.1)


def loss(params, x, labels, train=True):
    if train:  # BatchNorm uses and updates its statistics
        logits, params = pt.training(net)(params, x)
    else:
        logits = net(params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits, labels).mean(), params


@partial(jax.jit, static_argnames=("pattern", "train"))
def step(params, slots, x, labels, pattern=".*", train=True):
    value_and_grad = pt.value_and_grad(loss, pattern, has_aux=True)
    result, grads = value_and_grad(params, x, labels, train)
    value, params = result
    trained, rest = pt.partition(params, pattern, kind="param")
    updates, slots = tx.update(grads, slots, trained)
    trained = optax.apply_updates(trained, updates)
    return pt.merge(trained, rest), slots, value


# freeze
step_of_the_head = partial(step, pattern="dense0_.*")

# tie
shared = nn.Dense(8, activation="relu")
tied = nn.Sequential(
    nn.Dense(8, activation="relu"),
    shared,
    shared,
    nn.Dense(10),
)


# save
def save_and_load(params):
    pt.save("convbn.params", params)
    return pt.load("convbn.params", like=params)


# block
class Centered(nn.Layer):
    def __call__(self, p, x):
        scale = p.param("scale", (1,))
        return nn.Dense(10)(p.dense, x - x.mean()) * scale


# end
