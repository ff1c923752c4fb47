"""The classifier of pytorch_theirs.py in paramtree."""

# define
import jax
import optax
import paramtree as pt
from paramtree import nn

from images import tokens, x


def make(rate=0.0):
    return nn.Sequential(
        nn.Conv2D(8, 3, padding=1, use_bias=False),
        nn.BatchNorm(),
        nn.Activation("relu"),
        nn.Dropout(rate),
        nn.GlobalAvgPool2D(),
        nn.Flatten(),
        nn.Dense(3),
    )


# initialise
x = x.transpose(0, 2, 3, 1)  # (N, H, W, C)
net = make()
params = pt.init(net, jax.random.key(0), x)


# call
def predict(params, x):  # (N, H, W, C)
    return net(params, x)


# read
weight = params[0].weight  # or params.conv0.weight
names = list(pt.collect(params))

# train
tx = optax.adam(1e-2)


def loss(params, x, labels, key):
    logits, params = pt.training(net)(params, x, key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits, labels).mean(), params


def train(params, x, labels, pattern=".*", steps=5):
    value_and_grad = pt.value_and_grad(loss, pattern, has_aux=True)

    @jax.jit
    def step(params, slots, key):
        result, grads = value_and_grad(params, x, labels, key)
        value, params = result
        trained, rest = pt.partition(params, pattern, kind="param")
        updates, slots = tx.update(grads, slots, trained)
        trained = optax.apply_updates(trained, updates)
        return pt.merge(trained, rest), slots, value

    slots = tx.init(pt.select(params, pattern, kind="param"))
    losses = []
    for i in range(steps):
        key = jax.random.key(i)
        params, slots, value = step(params, slots, key)
        losses.append(value)
    return params, losses


# freeze
def train_head(params, x, labels):
    return train(params, x, labels, "dense0_.*")


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


# copy
FROM_TORCH = [
    (r"^1\.weight", "1.gamma"),
    (r"^1\.bias", "1.beta"),
]


def loaded(path, params):
    """Returns the parameters with the values of a checkpoint."""
    return pt.load(
        path,
        like=params,
        rename=FROM_TORCH,
        ignore_extra=".*num_batches_tracked",
    )


# end
