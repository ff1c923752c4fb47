"""A classifier in Equinox."""

# define
import equinox as eqx
import jax
import optax

from batch import labels, x


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key, rate=0.0):
        key1, key2 = jax.random.split(key)
        self.hidden = eqx.nn.Linear(8, 16, use_bias=False, key=key1)
        self.norm = eqx.nn.BatchNorm(
            16, "batch", momentum=0.9, mode="batch"
        )
        self.dropout = eqx.nn.Dropout(rate)
        self.head = eqx.nn.Linear(16, 3, key=key2)

    def __call__(self, x, state, key=None):
        h, state = self.norm(self.hidden(x), state)
        h = self.dropout(jax.nn.relu(h), key=key)
        return self.head(h), state


# initialise
make = eqx.nn.make_with_state(Net)
net, state = make(jax.random.key(0))


# call
def batched(net, x, state, keys=None):
    f = jax.vmap(net, (0, None, 0), (0, None), axis_name="batch")
    return f(x, state, keys)


y, _ = batched(eqx.nn.inference_mode(net), x, state)

# read
weight = net.hidden.weight  # (out, in)
names = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(net)
    if eqx.is_array(leaf)
]

# train
tx = optax.adam(1e-2)


@eqx.filter_jit
def step(net, state, slots, x, labels, key, chosen):
    trained, rest = eqx.partition(net, chosen)
    keys = jax.random.split(key, len(x))

    def loss(trained):
        net = eqx.combine(trained, rest)
        logits, new = batched(net, x, state, keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        )
        return losses.mean(), new

    value_and_grad = eqx.filter_value_and_grad(loss, has_aux=True)
    (value, new), grads = value_and_grad(trained)
    updates, slots = tx.update(grads, slots, trained)
    trained = eqx.apply_updates(trained, updates)
    return eqx.combine(trained, rest), new, slots, value


def train(net, state, chosen=None, steps=5):
    if chosen is None:
        chosen = jax.tree.map(eqx.is_inexact_array, net)
    slots, losses = tx.init(eqx.filter(net, chosen)), []
    for i in range(steps):
        net, state, slots, value = step(
            net, state, slots, x, labels, jax.random.key(i), chosen
        )
        losses.append(value)
    return net, state, losses


# freeze
def train_head(net, state):
    nothing = jax.tree.map(lambda leaf: False, net)
    head = jax.tree.map(eqx.is_inexact_array, net.head)
    chosen = eqx.tree_at(lambda net: net.head, nothing, head)
    return train(net, state, chosen)


# tie
class Language(eqx.Module):
    shared: eqx.nn.Shared
    body: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        embed = eqx.nn.Embedding(11, 8, key=keys[0])
        decode = eqx.nn.Linear(8, 11, use_bias=False, key=keys[1])
        self.shared = eqx.nn.Shared(
            (embed, decode),
            where=lambda pair: pair[1].weight,
            get=lambda pair: pair[0].weight,
        )
        self.body = eqx.nn.Linear(8, 8, key=keys[2])

    def __call__(self, token):
        embed, decode = self.shared()
        return decode(jax.nn.tanh(self.body(embed(token))))


language = Language(jax.random.key(0))


# save
def save_and_load(path, net, state):
    eqx.tree_serialise_leaves(path, (net, state))
    return eqx.tree_deserialise_leaves(path, (net, state))


# end
