"""Checkpoints keep the latest and the best steps, and restore a complete run on any mesh."""

import os
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
from paramtree.io import folders

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
    for keep in (0, -1, 2.5, True, "3", None):
        with pytest.raises(
            ValueError, match=f"keep={keep!r}: expected a number of checkpoints, at least 1"
        ):
            pt.Checkpoints(tmp_path, keep=keep)  # type: ignore[arg-type]
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


def test_only_what_is_finished_counts(tmp_path: Path) -> None:
    with pt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)}, wait=True)
    (tmp_path / "99").mkdir()
    begun = tmp_path / "98"  # as Orbax leaves it where it cannot rename
    begun.mkdir()
    (begun / "_CHECKPOINT_METADATA").write_text(
        '{"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": null}'
    )
    (begun / "default").mkdir()
    (tmp_path / "97" / "default.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "007").mkdir()
    (tmp_path / "96").mkdir()
    (tmp_path / "96" / "notes.txt").write_text("mine")
    with pt.Checkpoints(tmp_path) as again:
        assert again.steps == [1] and again.latest == 1
        assert again.load({"a": jnp.zeros(2)})["a"][0] == 1
        with pytest.raises(pt.LoadError, match="has no checkpoint of step 99. Steps saved: 1"):
            again.load(step=99)
        with pytest.raises(
            pt.ParamTreeError, match="cannot save step 96: .*96 exists and is no checkpoint"
        ):
            again.save(96, {"a": jnp.ones(2)})
        for step in (97, 98, 99):
            again.save(step, {"a": jnp.full(2, step)})
        assert again.steps == [97, 98, 99] and again.load()["a"][0] == 99
    assert (tmp_path / "96" / "notes.txt").read_text() == "mine"


# The best one


def test_a_metric_that_no_step_has_is_named(tmp_path: Path) -> None:
    with pt.Checkpoints(tmp_path, best="loss") as checkpoints:
        checkpoints.save(1, {"a": 1}, {"loss": 1.0, "time": 3})
    with pt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"a": 2})
        assert checkpoints.best is None
        with pytest.raises(pt.ParamTreeError, match="opened without a metric.*best='loss'.*its number"):
            checkpoints.load(step="best")
    with pt.Checkpoints(tmp_path, best="acc") as checkpoints:
        message = (
            "no step has the metric `acc`.*step 1 has loss, time; step 2 has none. Open it with best="
        )
        for refused in (lambda: checkpoints.best, lambda: checkpoints.load(step="best")):
            with pytest.raises(pt.ParamTreeError, match=message):
                refused()
        checkpoints.save(3, {"a": 3}, {"acc": 0.5})
        assert checkpoints.best == 3
    assert pt.Checkpoints(tmp_path, best="loss").load(step="best")["a"] == 1
    with pytest.raises(pt.LoadError, match="has no checkpoint. Steps saved: none yet"):
        pt.Checkpoints(tmp_path / "new", best="acc").load(step="best")


def test_a_layer_is_not_saved_in_place_of_its_parameters(tmp_path: Path) -> None:
    with pt.Checkpoints(tmp_path) as checkpoints:
        for wrong in (NET, {"net": nn.Dense(2)}):
            with pytest.raises(pt.MismatchError, match="was not written: .*the layer"):
                checkpoints.save(1, wrong)
        assert checkpoints.steps == []


# Deleting and replacing


def test_a_step_is_deleted(tmp_path: Path) -> None:
    with pt.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"step": step})
        checkpoints.delete(3)
        assert checkpoints.steps == [1, 2] and checkpoints.load({"step": 0})["step"] == 2
        with pytest.raises(pt.ParamTreeError, match="cannot delete step 3: .* Steps saved: 1, 2"):
            checkpoints.delete(3)
        with pytest.raises(TypeError, match="a non-negative integer as the step, not '1'"):
            checkpoints.delete("1")  # type: ignore[arg-type]
        checkpoints.save(3, {"step": 33}, wait=True)  # the run goes on from step 2
        assert checkpoints.load({"step": 0})["step"] == 33
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]


@pytest.mark.parametrize("system", ["exchanges folders", "does not"])
def test_a_step_is_replaced(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "does not":
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    with pt.Checkpoints(tmp_path, keep=1, best="loss") as checkpoints:
        checkpoints.save(1, {"step": 1}, {"loss": 0.0}, overwrite=True)  # there is none yet
        checkpoints.save(3, {"step": 3}, {"loss": 1.0})
        checkpoints.save(3, {"step": 33}, {"loss": 2.0}, overwrite=True)
        assert checkpoints.load({"step": 0}, step=3)["step"] == 33 and checkpoints.best == 1
        checkpoints.save(1, {"step": 11}, {"loss": 4.0}, overwrite=True)  # it was the best, and stays
        assert checkpoints.load({"step": 0}, step=1)["step"] == 11 and checkpoints.best == 3
        message = "cannot save step 2: .* a checkpoint of step 3.*replaces a step that exists: 1, 3"
        with pytest.raises(pt.ParamTreeError, match=message):
            checkpoints.save(2, {"step": 2}, {"loss": 1.0}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_step_that_is_replaced_is_there_at_every_moment(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"step": 1})
    rename, count = os.rename, 0

    def killed(old: Any, new: Any) -> None:  # what is left is what a kill here leaves
        nonlocal count
        old, new = str(old), str(new)
        count += ".replaced-" in new or (".saving-" in old and ".saving-" not in new)
        if count > ("before", "between", "after").index(moment):
            raise SystemExit("killed")
        rename(old, new)

    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(os, "rename", killed)
        checkpoints = pt.Checkpoints(tmp_path)
        checkpoints.save(1, {"step": 2}, overwrite=True)
        if moment == "after":
            checkpoints.wait()
        else:
            with pytest.raises(SystemExit, match="killed"):
                checkpoints.wait()
    reader = pt.Checkpoints(tmp_path)
    assert reader.steps == [1] and reader.load({"step": 0})["step"] == (2 if moment == "after" else 1)
    checkpoints.close()
    with pt.Checkpoints(tmp_path) as again:
        again.save(2, {"step": 3})
        assert again.steps == [1, 2]
        assert again.load({"step": 0}, step=1)["step"] == (2 if moment == "after" else 1)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
