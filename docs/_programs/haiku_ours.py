"""The weights of a Haiku model in a tree of paramtree."""

# copy
import paramtree as pt

FROM_HAIKU = [
    (r"/(w|embeddings)$", "/weight"),
    (r"/b$", "/bias"),
]
FROM_NET = [
    *FROM_HAIKU,
    (r"norm/scale", "norm/gamma"),
    (r"norm/offset", "norm/beta"),
    (r"norm/~/(mean|var)_ema/\w+", r"norm/running_\1"),
]


def copied(params, values, pairs=FROM_HAIKU):
    """Returns the parameters with the values of a Haiku model."""
    turned = pt.map_named(lambda name, w: w.T, values, ".*_w")
    return pt.replace(params, pt.rename(pt.from_tree(turned), pairs))


def copied_net(params, theirs, state, unused="counter|hidden"):
    """The same, for a model with statistics of shape (1, 16)."""
    tree = pt.from_tree({**theirs, **state})
    tree = pt.drop(tree, f".*_({unused})")
    flat = pt.map_named(
        lambda name, v: v.reshape(-1), tree, "norm/.*"
    )
    return copied(params, flat, FROM_NET)


# end
