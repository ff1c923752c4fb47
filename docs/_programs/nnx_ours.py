"""The weights of a Flax NNX model in a tree of paramtree."""

# copy
import paramtree as pt
from flax import nnx

FROM_NNX = [("(kernel|embedding)$", "weight")]
FROM_NET = [
    *FROM_NNX,
    ("norm/scale", "norm/gamma"),
    ("norm/bias", "norm/beta"),
    ("norm/(mean|var)", r"norm/running_\1"),
]


def copied(params, net, pairs=FROM_NET):
    """Returns the parameters with the values of a Flax model."""
    state = nnx.state(net, nnx.Any(nnx.Param, nnx.BatchStat))
    turned = pt.map_named(
        lambda name, w: w.T, nnx.to_pure_dict(state), ".*kernel"
    )
    return pt.replace(params, pt.rename(turned, pairs))


# end
