"""Checkpoints keep the latest and the best steps, and restore a complete run on any mesh."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import paramtree as pt
from paramtree import nn
from paramtree.core.tree import flatten

X = jax.ShapeDtypeStruct((4, 16), jnp.float32)
NET = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dense(8))
TIES = {"dense1/bias": "dense0/bias"}


class Run(NamedTuple):
    params: Any
    state: Any
    key: Any
    step: Any


def new_run(step: int = 0, seed: int = 0) -> Run:
    params = pt.init(NET, jax.random.key(seed), X, ties=TIES)
    return Run(params, optax.adam(1e-3).init(params), jax.random.key(7), step)


def same(actual: Any, expected: Any) -> bool:
    def data(leaf: Any) -> Any:
        typed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed else leaf)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(data(a), data(b)) for a, b in pairs)


def test_all_of_a_run_comes_back_in_one_call(tmp_path: Path) -> None:
    run = new_run(3)
    with pt.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest is checkpoints.best is None and checkpoints.steps == []
        checkpoints.save(3, run)
        found = checkpoints.load(like=new_run(0, seed=1))
    assert same(found, run) and found.step == 3 and type(found.step) is int
    assert found.params.dense1.bias is found.params.dense0.bias
    assert flatten(found.params)[0] is flatten(run.params)[0]
    shapes = jax.eval_shape(new_run)._replace(step=0)
    with pt.Checkpoints(tmp_path / "run") as again:  # loads into shapes alone
        assert same(again.load(like=shapes), run)
    bare = pt.load(tmp_path / "run")  # pt.load reads it too
    assert pt.ties(bare) and int(bare["step"]) == 3
    assert same(pt.load(tmp_path / "run" / "3", like=new_run()), run)


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    losses = [5.0, 1.0, float("nan"), 3.0, 4.0]
    with pt.Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
        for step, loss in enumerate(losses):
            checkpoints.save(step, {"step": step}, {"loss": loss, "other": 1})
        checkpoints.wait()
        assert checkpoints.steps == [1, 3, 4] and checkpoints.best == 1 and checkpoints.latest == 4
        assert checkpoints.load({"step": 0}, step="best")["step"] == 1
        assert checkpoints.load({"step": 0}, step=3)["step"] == 3
    with pt.Checkpoints(tmp_path, keep=2, best="loss") as again:
        assert again.steps == [1, 3, 4] and again.best == 1
    with pt.Checkpoints(tmp_path / "most", keep=1, best="accuracy", mode="max") as checkpoints:
        for step, accuracy in enumerate([0.1, float("nan"), 0.9, 0.5]):
            checkpoints.save(step, {"step": step}, {"accuracy": accuracy}, wait=True)
        assert checkpoints.best == 2 and checkpoints.steps == [2, 3]


def test_training_goes_on_while_it_is_saved(tmp_path: Path) -> None:
    advance = jax.jit(lambda a: a + 1, donate_argnums=0)
    value = jnp.zeros((500, 500), jnp.float32)
    with pt.Checkpoints(tmp_path, keep=10) as checkpoints:
        for step in range(8):
            checkpoints.save(step, {"value": value})
            for _ in range(3):
                value = advance(value)  # donates the buffer that is being saved
        for step in range(8):
            found = checkpoints.load({"value": value}, step=step)["value"]
            assert found.min() == found.max() == 3 * step


def test_a_checkpoint_of_one_mesh_loads_on_another(tmp_path: Path) -> None:
    def on(data: int, model: int, run: Any) -> Any:
        mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
        rules = {".*weight": P("model", "data"), ".*(gamma|beta|mean|var|bias)": P("model"), ".*": None}
        return pt.shardings(run, mesh, rules)

    run = new_run()
    with pt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(run, on(2, 4, run)))
        for shape in ((8, 1), (1, 8), (1, 1)):
            places = on(*shape, run)
            found = checkpoints.load(like=jax.eval_shape(new_run)._replace(step=0), shardings=places)
            assert same(found, run)
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True)
            assert all(leaf.sharding == place for leaf, place in pairs if hasattr(leaf, "sharding"))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0: expected a number of checkpoints, at least 1"):
        pt.Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="mode='least': expected 'min' or 'max'"):
        pt.Checkpoints(tmp_path, mode="least")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file. Checkpoints need a folder"):
        pt.Checkpoints(file)
    with pt.Checkpoints(tmp_path / "run", best="loss") as checkpoints:
        for wrong in ("1", -1, 1.5, True):
            with pytest.raises(TypeError, match=f"a non-negative integer as the step, not {wrong!r}"):
                checkpoints.save(wrong, {"a": 1}, {"loss": 0.5})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="the metric `loss` is not a number: 'low'"):
            checkpoints.save(1, {"a": 1}, {"loss": "low"})
        with pytest.raises(pt.LoadError, match="has no checkpoint. Steps saved: none yet"):
            checkpoints.load({"a": 1})
        with pytest.raises(
            pt.ParamTreeError, match="step 1 lack `loss`, which selects .* have accuracy. Pass it"
        ):
            checkpoints.save(1, {"a": 1}, {"accuracy": 0.5})
        checkpoints.save(5, {"a": jnp.ones(2)}, {"loss": 1.0})
        for step in (5, 4):
            message = f"cannot save step {step}: .* already has a checkpoint of step 5, and steps must increase"
            with pytest.raises(pt.ParamTreeError, match=message):
                checkpoints.save(step, {"a": 1}, {"loss": 0.5})
        with pytest.raises(pt.LoadError, match="has no checkpoint of step 4. Steps saved: 5"):
            checkpoints.load({"a": 1}, step=4)
        with pytest.raises(pt.LoadError, match=r"(?s)a.*shape.*\(3,\)"):
            checkpoints.load({"a": jnp.ones(3)})
        with pytest.raises(pt.MismatchError, match="`f` is a .*, not an array"):
            checkpoints.save(6, pt.from_tree({"f": jnp.tanh}), {"loss": 1.0})
        assert checkpoints.steps == [5]


def test_what_was_not_finished_does_not_count(tmp_path: Path) -> None:
    with pt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)}, wait=True)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with pt.Checkpoints(tmp_path) as again:
        assert again.latest == 1
        again.save(2, {"a": jnp.zeros(2)}, wait=True)
        assert again.steps == [1, 2]
