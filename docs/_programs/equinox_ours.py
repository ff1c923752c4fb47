"""The weights of an Equinox model in a tree of paramtree."""

# copy
import paramtree as pt

FROM_NET = [
    ("norm/weight", "norm/gamma"),
    ("norm/bias", "norm/beta"),
]
FROM_LANGUAGE = [("shared/pytree/0", "embed")]


def copied(params, net, state=None, pairs=FROM_NET):
    """Returns the parameters with the values of an Equinox model."""
    tree = pt.rename(pt.collect(net, sep="/"), pairs)
    params = pt.replace(params, tree)
    if state is None:
        return params
    mean, var = state.get(net.norm.batch_state_index)
    return pt.replace(
        params, {"norm_running_mean": mean, "norm_running_var": var}
    )


# end
