"""Initializers: their distributions, bounds and formulas, and their use in ``pt.init``."""

import contextlib
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from tests.helpers import x64

X = jax.ShapeDtypeStruct((2, 5), "float32")
NET = nn.Sequential(nn.Dense(4, activation="relu"), nn.Dense(3))

# Every callable public initializer: a factory, a shape, whether it is random.
TABLE = {
    "Zero": (init.Zero, (4, 3), False),
    "One": (init.One, (4, 3), False),
    "Constant": (lambda: init.Constant(0.25), (4, 3), False),
    "Constant array": (lambda: init.Constant(np.arange(3.0)), (4, 3), False),
    "Uniform": (init.Uniform, (4, 3), True),
    "Normal": (init.Normal, (4, 3), True),
    "TruncNorm": (init.TruncNorm, (4, 3), True),
    "Xavier": (init.Xavier, (4, 3), True),
    "VarianceScaling": (init.VarianceScaling, (4, 3), True),
    "Xavier gaussian": (lambda: init.Xavier("gaussian", "in", 2.0), (4, 3), True),
    "MSRAPrelu": (init.MSRAPrelu, (4, 3), True),
    "Orthogonal": (init.Orthogonal, (4, 3), True),
    "Orthogonal normal": (lambda: init.Orthogonal(1.0, "normal"), (4, 3), True),
    "Bilinear": (init.Bilinear, (2, 3, 4, 4), False),
    "LSTMBias": (init.LSTMBias, (8,), False),
}
BY_NAME = {
    "Mixed": lambda: init.Mixed([".*bias", ".*"], [init.Zero(), init.Normal()]),
    "Load": lambda: init.Load({"dense0_bias": np.zeros(4, "float32")}, init.One()),
}
rows = pytest.mark.parametrize("row", TABLE)


def sample(initializer, shape, repeats=1, seed=0, dtype=jnp.float32):
    """Returns values for several keys as float64[repeats, *shape]."""
    # No vmap or jit, so that all initializers share the code compiled for a shape.
    keys = jax.random.split(jax.random.key(seed), repeats)
    return np.stack([initializer(key, shape, dtype) for key in keys]).astype("float64")


def p_value(values, distribution):
    return scipy.stats.kstest(np.ravel(values), distribution.cdf).pvalue


def check_moments(values, mean, stdev):
    """Checks mean and standard deviation within five standard errors of a light-tailed sample."""
    assert abs(values.mean() - mean) < 5 * stdev / math.sqrt(values.size)
    assert abs(values.std() / stdev - 1) < 5 / math.sqrt(values.size)


def uniform(s):
    return scipy.stats.uniform(-s, 2 * s)


def told(info):
    """Returns the text of an error, with its notes."""
    return "\n".join([str(info.value), *getattr(info.value, "__notes__", [])])


def same(a, b):
    """Whether two trees have equal structures and values."""
    equal = jax.tree.map(lambda x, y: bool((x == y).all()) and x.dtype == y.dtype, a, b)
    return all(jax.tree.leaves(equal))


def test_every_initializer_has_a_row():
    public = {name for name, value in vars(init).items() if isinstance(value, type)}
    assert {name.split()[0] for name in TABLE} | set(BY_NAME) == public


# Distributions


def test_the_statistics_can_tell_distributions_apart():
    values = sample(init.Uniform(0.07), (100, 200))
    assert p_value(values, uniform(0.07)) > 1e-4
    assert p_value(values, uniform(0.074)) < 1e-4
    assert p_value(values, scipy.stats.norm(0, 0.07 / math.sqrt(3))) < 1e-4
    with pytest.raises(AssertionError):
        check_moments(values, 0.01, 0.07 / math.sqrt(3))
    with pytest.raises(AssertionError):
        check_moments(values, 0, 0.07)


@pytest.mark.parametrize("scale", [None, 0.01, 1.0, 3.5])
def test_uniform(scale):
    initializer = init.Uniform() if scale is None else init.Uniform(scale)
    s = 0.07 if scale is None else scale
    values = sample(initializer, (100, 200))
    check_moments(values, 0, s / math.sqrt(3))
    assert p_value(values, uniform(s)) > 1e-4
    assert np.abs(values).max() <= s * (1 + 1e-6)
    assert np.abs(values).max() > 0.999 * s
    assert len(np.unique(values)) > 0.99 * values.size


@pytest.mark.parametrize("sigma", [None, 0.1, 1.0, 2.5])
def test_normal(sigma):
    initializer = init.Normal() if sigma is None else init.Normal(sigma)
    s = 0.01 if sigma is None else sigma
    values = sample(initializer, (100, 200))
    check_moments(values, 0, s)
    assert p_value(values, scipy.stats.norm(0, s)) > 1e-4
    assert np.abs(values).max() > 3 * s
    assert len(np.unique(values)) > 0.99 * values.size


@pytest.mark.parametrize(("mean", "stdev"), [(None, None), (0.0, 1.0), (1.0, 0.5), (-3.0, 0.01)])
def test_truncnorm(mean, stdev):
    initializer = init.TruncNorm() if mean is None else init.TruncNorm(mean, stdev)
    m, s = (0.0, 0.01) if mean is None else (mean, stdev)
    values = sample(initializer, (100, 200))
    claimed = scipy.stats.truncnorm(-2, 2, loc=m, scale=s)
    check_moments(values, m, claimed.std())
    slack = 1e-6 * (abs(m) + s)
    assert np.abs(values - m).max() <= 2 * s + slack
    assert np.abs(values - m).max() > 1.99 * s
    # Far from 0, the steps between float32 values are large enough to show.
    if abs(m) < 100 * s:
        assert p_value(values, claimed) > 1e-4


def test_rates_of_zero_width():
    for initializer in (init.Uniform(0.0), init.Normal(0.0), init.TruncNorm(0.0, 0.0)):
        assert not sample(initializer, (5, 5)).any()
    assert (sample(init.TruncNorm(2.0, 0.0), (5, 5)) == 2).all()


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("make", [init.Zero, init.One, init.Uniform, init.Normal, init.TruncNorm])
def test_any_shape(make, shape, key):
    value = make()(key, shape, jnp.float32)
    assert value.shape == shape
    assert value.dtype == jnp.float32


def test_zero_and_one():
    assert not sample(init.Zero(), (3, 4)).any()
    assert (sample(init.One(), (3, 4)) == 1).all()


# Fans

FANS = {(30, 20): (20, 30), (16, 8, 3, 5): (8 * 15, 16 * 15), (6, 10, 4): (40, 24)}


def factor(shape, factor_type):
    fan_in, fan_out = FANS[shape]
    return {"in": fan_in, "out": fan_out, "avg": (fan_in + fan_out) / 2}[factor_type]


@pytest.mark.parametrize("shape", FANS, ids=str)
@pytest.mark.parametrize("factor_type", ["avg", "in", "out"])
@pytest.mark.parametrize("rnd_type", ["uniform", "gaussian"])
def test_xavier(rnd_type, factor_type, shape):
    for magnitude in (3, 1.0, 2.24):
        values = sample(init.Xavier(rnd_type, factor_type, magnitude), shape, repeats=20)
        s = math.sqrt(magnitude / factor(shape, factor_type))
        if rnd_type == "uniform":
            check_moments(values, 0, s / math.sqrt(3))
            assert np.abs(values).max() <= s * (1 + 1e-6)
            assert np.abs(values).max() > 0.99 * s
            assert p_value(values, uniform(s)) > 1e-4
        else:
            check_moments(values, 0, s)
            assert p_value(values, scipy.stats.norm(0, s)) > 1e-4


def test_xavier_defaults():
    assert init.Xavier() == init.Xavier("uniform", "avg", 3)
    values = sample(init.Xavier(), (30, 20), repeats=20)
    assert p_value(values, uniform(math.sqrt(3 / 25))) > 1e-4


@pytest.mark.parametrize("shape", FANS, ids=str)
@pytest.mark.parametrize("factor_type", ["avg", "in", "out"])
def test_msraprelu(factor_type, shape):
    for slope in (0.25, 0.0, 1.0):
        values = sample(init.MSRAPrelu(factor_type, slope), shape, repeats=20)
        s = math.sqrt(2 / (1 + slope**2) / factor(shape, factor_type))
        check_moments(values, 0, s)
        assert p_value(values, scipy.stats.norm(0, s)) > 1e-4


def test_msraprelu_defaults(key):
    assert init.MSRAPrelu() == init.MSRAPrelu("avg", 0.25)
    gaussian = init.Xavier("gaussian", "avg", 2 / (1 + 0.25**2))
    drawn = init.MSRAPrelu()(key, (6, 4), jnp.float32)
    assert (drawn == gaussian(key, (6, 4), jnp.float32)).all()


def test_a_fan_keeps_the_variance_of_activations(key):
    x = jax.random.normal(key, (500, 64))
    net = nn.Dense(512, weight_initializer=init.Xavier("gaussian", "in", 1.0))
    assert abs(float(net(net.init(key, x), x).var()) - 1) < 0.05


@pytest.mark.parametrize("initializer", [init.Xavier(), init.MSRAPrelu(), init.Orthogonal()], ids=repr)
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_fans_need_two_dimensions(initializer, shape, key):
    with pytest.raises(ValueError, match=r"needs .*at least two dimensions, but found .*\(") as info:
        initializer(key, shape, jnp.float32)
    assert str(shape) in str(info.value)
    with pytest.raises(ValueError, match="at least two dimensions") as info:
        pt.init(NET, key, X, rules={".*": initializer})
    assert "dense0_bias" in told(info)
    params = pt.init(NET, key, X, rules={".*weight": initializer})  # what the text says to do
    assert not params.dense0.bias.any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: init.Xavier("normal"), "rnd_type must be one of 'uniform', 'gaussian', not 'normal'"),
        (lambda: init.Xavier(factor_type="mean"), "factor_type must be one of .*'avg'.* not 'mean'"),
        (lambda: init.MSRAPrelu("fan"), "factor_type must be one of .*'avg'.* not 'fan'"),
        (lambda: init.Orthogonal(rand_type="gaussian"), "rand_type must be one of .* not 'gaussian'"),
    ],
    ids=["rnd_type", "factor_type", "msraprelu", "rand_type"],
)
def test_unknown_types(make, text, key):
    with pytest.raises(ValueError, match=text):
        make()(key, (3, 4), jnp.float32)


# Orthogonal


@pytest.mark.parametrize("rand_type", ["uniform", "normal"])
@pytest.mark.parametrize(
    "shape", [(9, 4), (4, 9), (6, 6), (4, 2, 3, 3), (9, 2, 2, 1), (1, 5), (5, 1)], ids=str
)
def test_orthogonal(shape, rand_type):
    for initializer, scale in (
        (init.Orthogonal(rand_type=rand_type), 1.414),
        (init.Orthogonal(0.5, rand_type), 0.5),
    ):
        for value in sample(initializer, shape, repeats=3):
            w = value.reshape(shape[0], -1)
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            np.testing.assert_allclose(gram, scale**2 * np.eye(len(gram)), atol=1e-5)
            np.testing.assert_allclose(np.linalg.svd(w, compute_uv=False), scale, rtol=1e-5)


def test_orthogonal_types_differ(key):
    shape = (6, 4)
    uniform_, normal = (init.Orthogonal(1.0, kind)(key, shape) for kind in ("uniform", "normal"))
    assert abs(uniform_ - normal).max() > 0.1
    assert init.Orthogonal() == init.Orthogonal(1.414, "uniform")


@pytest.mark.parametrize("rand_type", ["uniform", "normal"])
def test_orthogonal_has_the_precision_of_float64(rand_type):
    with x64():
        w = np.asarray(init.Orthogonal(1.0, rand_type)(jax.random.key(0), (6, 4), jnp.float64))
    assert w.dtype == np.float64
    np.testing.assert_allclose(w.T @ w, np.eye(4), atol=1e-12)


# Formulas


def bilinear(shape):
    """The formula, one value at a time."""
    height, width = shape[2:]
    f = math.ceil(width / 2)
    c = (2 * f - 1 - f % 2) / (2.0 * f)
    kernel = np.zeros(shape)
    for out in range(shape[0]):
        for into in range(shape[1]):
            for y in range(height):
                for x in range(width):
                    kernel[out, into, y, x] = (1 - abs(x / f - c)) * (1 - abs(y / f - c))
    return kernel


@pytest.mark.parametrize(
    "size", [*((n, n) for n in range(1, 8)), (4, 6), (6, 4), (3, 5), (5, 2), (1, 4)]
)
def test_bilinear(size, key):
    shape = (2, 3, *size)
    value = init.Bilinear()(key, shape, jnp.float32)
    np.testing.assert_allclose(value, bilinear(shape), atol=1e-6)


def test_bilinear_upsamples_a_constant_to_itself(key):
    # Each output of a stride-2 transposed convolution sums every second kernel value on each axis.
    kernel = np.asarray(init.Bilinear()(key, (1, 1, 4, 4), jnp.float32))[0, 0]
    for y, x in itertools.product(range(2), repeat=2):
        np.testing.assert_allclose(kernel[y::2, x::2].sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (1, 1, 2, 2, 2)], ids=str)
def test_bilinear_shape(shape, key):
    with pytest.raises(ValueError, match=r"Bilinear needs a shape \(out, in, height, width\)") as info:
        init.Bilinear()(key, shape, jnp.float32)
    assert str(shape) in str(info.value)


@pytest.mark.parametrize("size", [4, 8, 20])
def test_lstm_bias(size, key):
    for bias, initializer in ((1, init.LSTMBias()), (2.5, init.LSTMBias(2.5))):
        value = np.asarray(initializer(key, (size,), jnp.float32)).reshape(4, -1)
        assert (value == np.array([[0], [bias], [0], [0]])).all()


@pytest.mark.parametrize("shape", [(), (6,), (4, 4), (8, 1)], ids=str)
def test_lstm_bias_shape(shape, key):
    with pytest.raises(ValueError, match="LSTMBias needs a vector of four equal gates") as info:
        init.LSTMBias()(key, shape, jnp.float32)
    assert str(shape) in str(info.value)


# Constants


def test_constant_scalars(key):
    for value in (42, 0.5, -1.0, np.float32(3), np.array(2.0), jnp.float32(7), True):
        drawn = init.Constant(value)(key, (2, 3), jnp.float32)
        assert drawn.dtype == jnp.float32
        assert drawn.shape == (2, 3)
        assert (drawn == jnp.float32(value)).all()
    assert init.Constant(42)(key, (), jnp.int32).dtype == jnp.int32


@pytest.mark.parametrize("array", [jnp.array, np.array, list], ids=["jax", "numpy", "list"])
def test_constant_arrays_broadcast(array, key):
    for value in ([1.0, 2.0, 3.0], [[1.0], [2.0]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]):
        drawn = init.Constant(array(value))(key, (2, 3), jnp.float32)
        np.testing.assert_array_equal(drawn, np.broadcast_to(np.array(value, "float32"), (2, 3)))


def test_constant_that_does_not_broadcast(key):
    with pytest.raises(ValueError, match="broadcast"):
        init.Constant(np.zeros(4))(key, (2, 3), jnp.float32)
    with pytest.raises(ValueError, match="broadcast") as info:
        pt.init(NET, key, X, rules={".*0_bias": init.Constant(np.zeros(7))})
    assert "dense0_bias" in told(info)


def test_constant_equality_and_hash():
    array = np.arange(3.0)
    groups = [
        [init.Constant(42), init.Constant(42)],
        [init.Constant(43)],
        [init.Constant(0.0), init.Constant(0.0)],
        [init.Constant(-0.0)],  # differs from 0.0 in 1 / x
        [init.Constant(float("nan")), init.Constant(float("nan"))],
        [init.Constant(array), init.Constant(array.copy()), init.Constant(list(array))],
        [init.Constant(array[:2])],
        [init.Constant(array[:, None])],
        [init.Constant(array.astype("float32")), init.Constant(jnp.arange(3, dtype=jnp.float32))],
        [init.Constant(array.astype("int32").view("float32"))],
    ]
    for i, group in enumerate(groups):
        for j, other in enumerate(groups):
            for a, b in itertools.product(group, other):
                assert (a == b) == (i == j)
                assert i != j or hash(a) == hash(b)
    assert init.Constant(0) != 0
    assert init.Constant(0) != init.Zero()
    assert init.Constant(array) != array.tolist()


def test_constants_that_look_alike_do_not_share_compiled_code(key):
    for value in (0.0, -0.0):
        bias = pt.init(NET, key, X, rules={".*bias": init.Constant(value)}).dense0.bias
        assert (np.signbit(bias) == np.signbit(value)).all()


def test_a_constant_array_is_copied(key):
    value = jnp.arange(4, dtype=jnp.float32)
    params = pt.init(NET, key, X, rules={"dense0_bias": init.Constant(value)})
    assert params.dense0.bias is not value
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    np.testing.assert_array_equal(doubled.dense0.bias, 2 * np.arange(4))
    np.testing.assert_array_equal(value, np.arange(4))  # not donated with the tree


def test_a_constant_may_be_traced(key):
    @jax.jit
    def start(value):
        return pt.init(NET, key, X, rules={".*bias": init.Constant(value)})

    params = start(jnp.float32(3))
    assert (params.dense0.bias == 3).all()
    assert (params.dense1.bias == 3).all()


# Settings and keys


def settings():
    """Yields factories of initializers that are all different."""
    yield init.Zero
    yield init.One
    for value in (1.0, 2.0):
        yield lambda value=value: init.Constant(value)
    yield lambda: init.Constant(np.arange(3.0))
    for scale in (0.07, 0.5):
        yield lambda scale=scale: init.Uniform(scale)
        yield lambda scale=scale: init.Normal(scale)
        yield lambda scale=scale: init.Orthogonal(scale, "normal")
        yield lambda scale=scale: init.LSTMBias(scale)
        yield lambda scale=scale: init.MSRAPrelu("in", scale)
    for mean, stdev in ((0.0, 1.0), (1.0, 1.0), (0.0, 2.0)):
        yield lambda mean=mean, stdev=stdev: init.TruncNorm(mean, stdev)
    for options in itertools.product(("uniform", "gaussian"), ("avg", "in", "out"), (1.0, 3.0)):
        yield lambda options=options: init.Xavier(*options)
    yield lambda: init.MSRAPrelu("out", 0.5)
    yield lambda: init.Orthogonal(0.5, "uniform")
    yield init.Bilinear
    yield lambda: init.Mixed([".*"], [init.Zero()])
    yield lambda: init.Mixed((".*",), (init.One(),))
    yield lambda: init.Mixed([".*bias", ".*"], [init.Zero(), init.Uniform()])


def test_equality_and_hash():
    made = [make() for make in settings()]
    again = [make() for make in settings()]
    for i, a in enumerate(made):
        for j, b in enumerate(again):
            assert (a == b) == (i == j), (a, b)
        assert hash(a) == hash(again[i])
    index = {initializer: i for i, initializer in enumerate(made)}
    assert len(index) == len(made)
    assert [index[initializer] for initializer in again] == list(range(len(made)))


def test_load_is_a_dictionary_key():
    load = BY_NAME["Load"]()
    assert {load: 1}[load] == 1
    assert load != BY_NAME["Mixed"]()


@pytest.mark.parametrize("row", [*TABLE, *BY_NAME])
def test_immutable_readable_and_pickled(row):
    make = TABLE[row][0] if row in TABLE else BY_NAME[row]
    initializer = make()
    assert repr(initializer) == repr(make())
    assert repr(initializer).startswith(row.split()[0] + "(")
    with pytest.raises(AttributeError, match="cannot assign to field 'scale'"):
        initializer.scale = 1
    restored = pickle.loads(pickle.dumps(initializer))
    assert repr(restored) == repr(initializer)
    if row != "Load":
        assert restored == initializer
        assert hash(restored) == hash(initializer)


@rows
def test_the_key_decides(row):
    make, shape, draws = TABLE[row]
    one, again, other = (make()(jax.random.key(seed), shape, jnp.float32) for seed in (1, 1, 2))
    assert (one == again).all()
    assert bool((one != other).any()) == draws


@rows
def test_the_same_under_jit(row, key):
    make, shape, _ = TABLE[row]
    eager = make()(key, shape, jnp.float32)
    compiled = jax.jit(make(), static_argnums=(1, 2))(key, shape, jnp.float32)
    np.testing.assert_allclose(eager, compiled, rtol=1e-5, atol=1e-7)


@rows
def test_init_under_jit(row, key):
    make, shape, _ = TABLE[row]

    def model(p):
        for name in ("a", "b", "c"):  # equal specs, computed in one loop
            p[name].param("w", shape, make())

    eager = pt.init(model, key)
    compiled = jax.jit(lambda key: pt.init(model, key))(key)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@rows
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(row, dtype, key):
    make, shape, _ = TABLE[row]
    value = make()(key, shape, jnp.dtype(dtype))
    assert value.dtype == jnp.dtype(dtype)
    assert value.shape == shape
    assert np.isfinite(np.asarray(value, "float32")).all()
    by_name = make()(key, shape, dtype)
    assert by_name.dtype == jnp.dtype(dtype)

    def start(key):
        return pt.init(lambda p: p.param("w", shape, make(), dtype), key)

    params = start(key) if dtype == "bfloat16" else jax.eval_shape(start, key)
    assert params.w.dtype == jnp.dtype(dtype)
    assert params.w.shape == shape


@rows
def test_float64(row):
    make, shape, _ = TABLE[row]
    with x64():
        assert make()(jax.random.key(0), shape, jnp.float64).dtype == jnp.float64

        def start(key):
            return pt.init(lambda p: p.param("w", shape, make(), "float64"), key)

        assert jax.eval_shape(start, jax.random.key(0)).w.dtype == jnp.float64


@rows
def test_dtype_defaults_to_float32(row, key):
    make, shape, _ = TABLE[row]
    assert make()(key, shape).dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_keeps_the_distribution(dtype, step):
    for initializer, claimed, bound in (
        (init.Uniform(), uniform(0.07), 0.07),
        (init.Normal(0.1), scipy.stats.norm(0, 0.1), math.inf),
        (init.TruncNorm(0.0, 0.1), scipy.stats.truncnorm(-2, 2, scale=0.1), 0.2),
        (init.Xavier(), uniform(math.sqrt(3 / 150)), math.sqrt(3 / 150)),
    ):
        values = sample(initializer, (100, 200), dtype=dtype)
        # Values are rounded, so compare moments with a tolerance for rounding.
        assert abs(values.mean()) < 5 * claimed.std() / math.sqrt(values.size) + step * claimed.std()
        assert abs(values.std() / claimed.std() - 1) < 0.02
        assert np.abs(values).max() <= bound * (1 + 2 * step)


def test_bounds_survive_rounding_in_half_precision():
    w = sample(init.Orthogonal(1.0), (6, 4), dtype="bfloat16")[0]
    np.testing.assert_allclose(w.T @ w, np.eye(4), atol=0.03)


# In layers and rules


def ramp(key, shape, dtype):
    size = math.prod(shape)
    return jnp.linspace(0, 1, size, dtype=dtype).reshape(shape)


JAX = {
    "zeros": jax.nn.initializers.zeros,
    "normal": jax.nn.initializers.normal(0.1),
    "uniform": jax.nn.initializers.uniform(0.1),
    "truncated_normal": jax.nn.initializers.truncated_normal(0.1),
    "glorot_uniform": jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0),
    "he_normal": jax.nn.initializers.he_normal(in_axis=1, out_axis=0),
    "lecun_normal": jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0),
    "orthogonal": jax.nn.initializers.orthogonal(),
    "constant": jax.nn.initializers.constant(0.5),
    "ramp": ramp,
}


@pytest.mark.parametrize("name", JAX)
def test_any_function_is_an_initializer(name, key):
    function = JAX[name]
    layer = nn.Dense(4, weight_initializer=function)
    in_layer = pt.init(layer, key, X)
    in_rules = pt.init(nn.Dense(4), key, X, rules={"weight": function})
    again = pt.reinit(pt.init(nn.Dense(4), jax.random.key(9), X), key, {".*": init.Zero()})
    again = pt.reinit(again, key, {"weight": function})
    assert same(in_layer, in_rules)
    assert same(in_layer, again)
    assert layer == nn.Dense(4, weight_initializer=function)


def test_any_function_works_under_jit(key):
    for function in (ramp, JAX["normal"]):
        layer = nn.Dense(4, weight_initializer=function)
        compiled = jax.jit(lambda key, layer=layer: pt.init(layer, key, X))(key)
        np.testing.assert_allclose(pt.init(layer, key, X).weight, compiled.weight, rtol=1e-5, atol=1e-6)


def test_a_custom_function_gives_the_values(key):
    params = pt.init(nn.Dense(3, weight_initializer=ramp, bias_initializer=ramp), key, X)
    np.testing.assert_allclose(params.weight, np.linspace(0, 1, 15).reshape(3, 5), rtol=1e-6)
    np.testing.assert_allclose(params.bias, [0, 0.5, 1], rtol=1e-6)


def test_a_custom_function_may_be_unhashable_or_return_numpy(key):
    class Unhashable:
        __hash__ = None

        def __call__(self, key, shape, dtype):
            return np.full(shape, 3.0, "float32")

    params = pt.init(NET, key, X, rules={".*": Unhashable()})
    assert all((leaf == 3).all() for leaf in jax.tree.leaves(params))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_a_float_of_another_precision_is_converted(key):
    layer = nn.Dense(3, dtype="bfloat16", bias_initializer=lambda *_: jnp.ones(3, jnp.float32))
    x = jax.ShapeDtypeStruct((2, 5), "bfloat16")
    assert pt.init(layer, key, x).bias.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("function", "found"),
    [(lambda *_: jnp.ones(7), r"float32\(7,\)"), (lambda *_: jnp.ones(4, jnp.int32), r"int32\(4,\)")],
    ids=["shape", "dtype"],
)
def test_a_custom_function_that_gives_something_else(function, found, key):
    with pytest.raises(pt.MismatchError, match=rf"`dense0_bias`.* gave {found}.*float32\(4,\)"):
        pt.init(NET, key, X, rules={"dense0_bias": function})


def test_an_error_in_a_custom_function_names_the_leaf(key):
    def broken(key, shape, dtype):
        raise ZeroDivisionError("as it happens")

    with pytest.raises(ZeroDivisionError, match="as it happens") as info:
        pt.init(NET, key, X, rules={"dense1_bias": broken})
    assert "dense1_bias" in told(info)


def test_what_is_not_an_initializer(key):
    with pytest.raises(pt.RuleError, match=r"'\.\*' gives 3"):
        pt.init(NET, key, X, rules={".*": 3})
    with pytest.raises(TypeError, match="initializer of `dense0_bias` is 3") as info:
        pt.init(nn.Sequential(nn.Dense(3, bias_initializer=3)), key, X)
    assert "(key, shape, dtype) -> Array" in str(info.value)


def test_a_layers_defaults(key):
    params = pt.init(nn.Dense(100), key, jnp.ones((1, 200)))
    assert p_value(np.asarray(params.weight, "float64"), uniform(0.07)) > 1e-4
    assert not params.bias.any()
    explicit = nn.Dense(100, weight_initializer=init.Uniform(0.07), bias_initializer=init.Zero())
    assert same(params, pt.init(explicit, key, jnp.ones((1, 200))))


def test_leaves_are_independent(key):
    net = nn.Sequential(*[nn.Dense(40, use_bias=False) for _ in range(4)])
    leaves = jax.tree.leaves(pt.init(net, key, jnp.ones((1, 40))))
    correlation = np.corrcoef([np.ravel(leaf) for leaf in leaves])
    assert np.abs(correlation - np.eye(4)).max() < 5 / 40


# Names

STRINGS = {
    "zeros": init.Zero(),
    "ones": init.One(),
    "uniform": init.Uniform(),
    "normal": init.Normal(),
    "truncnorm": init.TruncNorm(),
    "orthogonal": init.Orthogonal(),
    "xavier": init.Xavier(),
    "msraprelu": init.MSRAPrelu(),
    "bilinear": init.Bilinear(),
    "lstmbias": init.LSTMBias(),
}


@pytest.mark.parametrize("name", STRINGS)
def test_get(name):
    assert init.get(name) == STRINGS[name]
    assert init.get(STRINGS[name]) is STRINGS[name]


def test_get_leaves_functions_alone():
    assert init.get(ramp) is ramp


def test_strings_in_layers(key):
    by_string = nn.Dense(4, weight_initializer="xavier", bias_initializer="ones")
    by_object = nn.Dense(4, weight_initializer=init.Xavier(), bias_initializer=init.One())
    assert by_string == by_object
    assert hash(by_string) == hash(by_object)
    assert same(pt.init(by_string, key, X), pt.init(by_object, key, X))
    table = nn.Embedding(5, 2, weight_initializer="normal")
    assert table == nn.Embedding(5, 2, weight_initializer=init.Normal())


@pytest.mark.parametrize(
    "use",
    [
        lambda name: init.get(name),
        lambda name: nn.Dense(4, weight_initializer=name),
        lambda name: nn.Dense(4, bias_initializer=name),
        lambda name: nn.Embedding(4, 2, weight_initializer=name),
    ],
    ids=["get", "weight", "bias", "embedding"],
)
def test_unknown_string(use):
    with pytest.raises(ValueError, match=r"no initializer 'xavie'\. The names are .*xavier"):
        use("xavie")
    use("xavier")


# By name


@pytest.mark.parametrize("kind", BY_NAME)
def test_by_name_has_to_know_the_name(kind, key):
    initializer = BY_NAME[kind]()
    with pytest.raises(
        pt.ParamTreeError, match=f"{kind} depends on .* name: use it in the rules"
    ) as info:
        initializer(key, (4,), jnp.float32)
    assert "{'.*': initializer}" in str(info.value)
    pt.init(NET, key, X, rules={".*": initializer})  # what the text says to do
    pt.reinit(pt.init(NET, key, X), key, {".*": initializer})


def test_mixed(key):
    mixed = init.Mixed([".*0_bias", "dense1.*", ".*"], [init.One(), init.Constant(7), init.Normal()])
    params = pt.init(NET, key, X, rules={".*": mixed})
    assert (params.dense0.bias == 1).all()
    assert (params.dense1.weight == 7).all()
    assert (params.dense1.bias == 7).all()
    rules = {".*0_bias": init.One(), "dense1.*": init.Constant(7), ".*": init.Normal()}
    assert same(params, pt.init(NET, key, X, rules=rules))
    assert same(params, pt.reinit(pt.init(NET, jax.random.key(5), X), key, {".*": mixed}))
    assert same(params, jax.jit(lambda key: pt.init(NET, key, X, rules={".*": mixed}))(key))


def test_mixed_takes_the_first_match_of_a_whole_name(key):
    mixed = init.Mixed(
        ["dense0", "bias", ".*bias", ".*"], [init.Normal(), init.Normal(), init.One(), init.Zero()]
    )
    params = pt.init(NET, key, X, rules={".*": mixed})
    assert (params.dense0.bias == 1).all()
    assert not params.dense0.weight.any()


def test_mixed_for_some_names_only(key):
    plain = pt.init(NET, key, X)
    params = pt.init(
        NET, key, X, rules={".*bias": init.Mixed([".*0.*", ".*"], [init.One(), init.Zero()])}
    )
    assert same(params.dense0.weight, plain.dense0.weight)
    assert (params.dense0.bias == 1).all()
    assert not params.dense1.bias.any()


def test_mixed_in_a_layer(key):
    mixed = init.Mixed(["dense0_.*", ".*"], [init.One(), init.Zero()])
    layers = [nn.Dense(3, weight_initializer=mixed) for _ in range(2)]
    params = pt.init(nn.Sequential(*layers), key, X)
    assert (params.dense0.weight == 1).all()
    assert not params.dense1.weight.any()


def test_mixed_without_a_match(key):
    with pytest.raises(pt.RuleError, match="no pattern of Mixed matches `dense0_weight`") as info:
        pt.init(NET, key, X, rules={".*": init.Mixed([".*bias"], [init.Zero()])})
    assert "'.*'" in str(info.value)
    fixed = init.Mixed([".*bias", ".*"], [init.Zero(), init.Uniform()])
    assert same(pt.init(NET, key, X, rules={".*": fixed}), pt.init(NET, key, X))


def test_mixed_takes_as_many():
    with pytest.raises(ValueError, match="as many patterns as initializers, but found 2 and 1"):
        init.Mixed([".*bias", ".*"], [init.Zero()])


def arrays(seed=3):
    """Returns values for every name of the net."""
    shapes = {
        "dense0_weight": (4, 5),
        "dense0_bias": (4,),
        "dense1_weight": (3, 4),
        "dense1_bias": (3,),
    }
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "arg:", "aux:"])
def test_load(prefix, key):
    saved = arrays()
    load = init.Load({prefix + name: array for name, array in saved.items()})
    params = pt.init(NET, key, X, rules={".*": load})
    assert {name: leaf.tolist() for name, leaf in pt.collect(params).items()} == {
        name: array.tolist() for name, array in saved.items()
    }
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert same(params, jax.jit(lambda key: pt.init(NET, key, X, rules={".*": load}))(key))
    assert same(params, pt.reinit(pt.init(NET, key, X), key, {".*": load}))


def test_load_prefixes_side_by_side(key):
    saved = arrays()
    mixed = {
        "dense0_weight": saved["dense0_weight"],
        "arg:dense0_weight": saved["dense0_weight"] + 1,  # the name itself comes first
        "arg:dense0_bias": saved["dense0_bias"],
        "aux:dense1_weight": saved["dense1_weight"],
        "dense1_bias": saved["dense1_bias"],
        "arg:unused": np.zeros(99),
    }
    params = pt.init(NET, key, X, rules={".*": init.Load(mixed)})
    for name, leaf in pt.collect(params).items():
        np.testing.assert_array_equal(leaf, saved[name])


def test_load_from_a_tree(key):
    trained = pt.init(NET, jax.random.key(7), X)
    params = pt.init(NET, key, X, rules={".*": init.Load(pt.collect(trained))})
    assert same(params, trained)
    assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (params, trained)), strict=True))


def test_load_default_init(key):
    saved = arrays()
    load = init.Load({"dense0_weight": saved["dense0_weight"]}, init.Constant(9))
    params = pt.init(NET, key, X, rules={".*": load})
    np.testing.assert_array_equal(params.dense0.weight, saved["dense0_weight"])
    assert (params.dense0.bias == 9).all()
    assert (params.dense1.weight == 9).all()


def test_load_default_init_may_go_by_name_too(key):
    saved = arrays()
    mixed = init.Mixed([".*bias", ".*"], [init.One(), init.Zero()])
    load = init.Load({"dense0_weight": saved["dense0_weight"]}, mixed)
    params = pt.init(NET, key, X, rules={".*": load})
    np.testing.assert_array_equal(params.dense0.weight, saved["dense0_weight"])
    assert (params.dense0.bias == 1).all()
    assert not params.dense1.weight.any()
    nested = pt.init(NET, key, X, rules={".*": init.Mixed([".*"], [load])})
    assert same(nested, params)


def test_load_without_the_name(key):
    saved = arrays()
    lacking = {name: saved[name] for name in ("dense0_weight", "dense0_bias", "dense1_bias")}
    with pytest.raises(pt.RuleError, match="Load has no array for `dense1_weight`") as info:
        pt.init(NET, key, X, rules={".*": init.Load(lacking)})
    assert "default_init" in str(info.value)
    assert all(name in str(info.value) for name in lacking)
    params = pt.init(NET, key, X, rules={".*": init.Load(lacking, init.One())})  # the text's advice
    assert (params.dense1.weight == 1).all()


@pytest.mark.parametrize("wrong", [(5,), (4, 1), (1,), ()], ids=str)
def test_load_of_a_wrong_shape(wrong, key):
    saved = arrays()
    saved["dense0_bias"] = np.zeros(wrong, "float32")  # (1,) and () would broadcast
    with pytest.raises(ValueError, match=r"expected \(4,\)") as info:
        pt.init(NET, key, X, rules={".*": init.Load(saved)})
    assert f"array of shape {wrong}" in str(info.value)
    assert "dense0_bias" in told(info)


@pytest.mark.parametrize("jit", [False, True])
def test_load_checks_the_shape_beside_an_equal_constant(jit, key):
    # A Constant broadcasts and an array from Load does not, even if their values are equal.
    net = nn.Sequential(nn.Dense(3), nn.Dense(3))
    rules = {
        "dense0_bias": init.Constant(np.float32(5)),
        "dense1_bias": init.Load({"dense1_bias": np.float32(5)}),
    }

    def start(key):
        return pt.init(net, key, X, rules=rules)

    with pytest.raises(ValueError, match=r"array of shape \(\), expected \(3,\)"):
        (jax.jit(start) if jit else start)(key)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32"])
def test_load_converts_to_the_models_dtype(dtype, key):
    load = init.Load({"bias": np.arange(3).astype(jnp.dtype(dtype))}, init.Zero())
    params = pt.init(nn.Dense(3), key, X, rules={".*": load})
    assert params.bias.dtype == jnp.float32
    assert params.bias.tolist() == [0, 1, 2]


def test_names_that_only_an_alias_has(key):
    # A deduplicated file may store a tied array under its last name.
    layer = nn.Dense(5)
    tied = nn.Sequential(layer, layer)
    saved = {"dense1_weight": np.eye(5, dtype="float32"), "dense1_bias": np.ones(5, "float32")}
    with contextlib.suppress(pt.RuleError):  # an error or the right values, nothing else
        params = pt.init(tied, key, X, rules={".*": init.Load(saved)})
        np.testing.assert_array_equal(params.dense0.weight, np.eye(5))
