"""Weight norm, spectral norm and weight standardisation give what PyTorch gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from paramtree import parametrizations as par

torch = pytest.importorskip("torch")

SHAPES = {"dense": (6, 5), "conv": (4, 3, 3, 3)}


def layers(kind: str) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=SHAPES[kind]).astype(np.float32)
    if kind == "dense":
        theirs = torch.nn.Linear(5, 6, bias=False)
        x = rng.normal(size=(7, 5)).astype(np.float32)
        return nn.Dense(6, use_bias=False), theirs, weight, x
    theirs = torch.nn.Conv2d(3, 4, 3, bias=False)
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    return nn.Conv2D(4, 3, use_bias=False, layout="NCHW"), theirs, weight, x


@pytest.mark.parametrize("kind", SHAPES)
def test_weight_norm(kind: str) -> None:
    net, theirs, weight, x = layers(kind)
    theirs.weight.data = torch.tensor(weight)
    theirs = torch.nn.utils.parametrizations.weight_norm(theirs)
    rules = {"weight": par.WeightNorm()}
    params = pt.expand(pt.from_tree({"weight": jnp.asarray(weight)}), rules)
    made = pt.reparametrize(net, rules)
    y = theirs(torch.tensor(x))
    (y**3).sum().backward()
    np.testing.assert_allclose(made(params, x), y.detach().numpy(), rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: (made(p, x) ** 3).sum())(params)
    parts = theirs.parametrizations.weight
    for name, part in (("g", parts.original0), ("v", parts.original1)):
        want = part.grad.numpy()
        np.testing.assert_allclose(grads.weight[name], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", SHAPES)
def test_spectral_norm(kind: str) -> None:
    net, theirs, weight, x = layers(kind)
    theirs.weight.data = torch.tensor(weight)
    theirs = torch.nn.utils.parametrizations.spectral_norm(theirs)
    norm = theirs.parametrizations.weight[0]
    rules = {"weight": par.SpectralNorm()}
    params = pt.expand(pt.from_tree({"weight": jnp.asarray(weight)}), rules, jax.random.key(0))
    vectors = {"weight/u": norm._u.numpy().copy(), "weight/v": norm._v.numpy().copy()}
    params = pt.replace(params, vectors)
    made = pt.reparametrize(net, rules)
    y = theirs(torch.tensor(x))  # in training: one iteration
    (y**3).sum().backward()

    def loss(p: Any) -> Any:
        y, new = pt.training(made)(p, x)
        return (y**3).sum(), (y, new)

    grads, (ours, new) = pt.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-5, atol=1e-5)
    want = theirs.parametrizations.weight.original.grad.numpy()
    np.testing.assert_allclose(grads.weight.weight, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(new.weight.u, norm._u.numpy(), rtol=1e-5, atol=1e-5)
    theirs.eval()
    np.testing.assert_allclose(
        made(new, x), theirs(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("gain", [None, 1.7139])
def test_weight_standardization(kind: str, gain: float | None) -> None:
    net, theirs, weight, x = layers(kind)
    value = torch.tensor(weight, requires_grad=True)
    gains = torch.full((len(weight),), 1.0 if gain is None else gain, requires_grad=True)
    # As it is usually written with PyTorch: the batch normalization of the weight, as one example.
    fan = 1 if gain is None else weight[0].size
    standard = torch.nn.functional.batch_norm(
        value.reshape(1, len(weight), -1), None, None, gains * fan**-0.5, training=True, eps=1e-6
    )
    standard = standard.reshape(weight.shape)
    y = torch.func.functional_call(theirs, {"weight": standard}, torch.tensor(x))
    (y**3).sum().backward()
    rules = {"weight": par.WeightStandardization(gain=gain)}
    params = pt.expand(pt.from_tree({"weight": jnp.asarray(weight)}), rules)
    made = pt.reparametrize(net, rules)
    np.testing.assert_allclose(made(params, x), y.detach().numpy(), rtol=1e-5, atol=1e-4)
    grads = jax.grad(lambda p: (made(p, x) ** 3).sum())(params)
    weight_part = "weight" if gain is None else "v"
    found = {"weight": grads.weight} if gain is None else {**grads.weight}
    for name, want in ((weight_part, value.grad.numpy()), ("gain", gains.grad.numpy())):
        if name in found:
            np.testing.assert_allclose(
                found[name].reshape(want.shape), want, rtol=1e-5, atol=1e-5 * np.abs(want).max()
            )
