"""The weights of a Flax Linen model in a tree of paramtree."""

# copy
import paramtree as pt

FROM_LINEN = [
    ("^(params|batch_stats)/", ""),
    ("(kernel|embedding)$", "weight"),
]
FROM_NET = [
    *FROM_LINEN,
    ("norm/scale", "norm/gamma"),
    ("norm/bias", "norm/beta"),
    ("norm/(mean|var)", r"norm/running_\1"),
]


def copied(params, variables, pairs=FROM_NET):
    """Returns the parameters with the values of a Flax model."""
    turned = pt.map_named(lambda name, w: w.T, variables, ".*kernel")
    return pt.replace(params, pt.rename(turned, pairs))


# end
