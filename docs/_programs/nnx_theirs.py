"""A classifier in Flax NNX."""

# define
import optax
import orbax.checkpoint as ocp
from flax import nnx

from batch import labels, x


class Net(nnx.Module):
    def __init__(self, rate=0.0, *, rngs):
        self.hidden = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.hidden(x)))
        return self.head(self.dropout(h))


# initialise
net = Net(rngs=nnx.Rngs(0))

# call
net.eval()
y = net(x)

# read
weight = net.hidden.kernel[...]  # (in, out)
names = [
    "_".join(path) for path, _ in nnx.to_flat_state(nnx.state(net))
]

# train
tx = optax.adam(1e-2)


def train(net, wrt=nnx.Param, steps=5):
    net = nnx.clone(net)  # the steps below change it
    net.train()
    optimizer = nnx.Optimizer(net, tx, wrt=wrt)

    @nnx.jit
    def step(net, optimizer, x, labels):
        def loss(net):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                net(x), labels
            )
            return losses.mean()

        of = nnx.DiffState(0, wrt)
        value, grads = nnx.value_and_grad(loss, argnums=of)(net)
        optimizer.update(net, grads)
        return value

    losses = [step(net, optimizer, x, labels) for _ in range(steps)]
    return net, losses


# freeze
def train_head(net):
    return train(net, nnx.All(nnx.Param, nnx.PathContains("head")))


# tie
class Language(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.body = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        h = nnx.tanh(self.body(self.embed(tokens)))
        return self.embed.attend(h)


language = Language(rngs=nnx.Rngs(0))


# save
def save_and_load(path, net):
    graph, state = nnx.split(net)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        values = checkpointer.restore(path, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


# end
