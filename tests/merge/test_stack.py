"""Stacks of models: what fits, what does not and how that is told; task vectors and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import Fixed, trees
from jaxpeft.merge import MergeInputError, add, check_finite, soup, stacked, task_vectors, uniform_soup
from jaxpeft.merge.stack import weighted_sum


class Net(NamedTuple):
    w: jax.Array
    n: jax.Array


def net(value):
    return Net(jnp.full(3, value, jnp.float32), jnp.asarray(7, jnp.int32))


def test_a_named_tuple_is_a_model_and_a_list_is_models():
    assert stacked([net(0), net(1)]).w.shape == (2, 3)
    assert stacked(stacked([net(0), net(1)])).w.shape == (2, 3)


def test_a_model_that_is_a_list_is_told_from_models_by_its_base():
    base = [jnp.zeros(2), jnp.zeros(3)]
    stack = [jnp.ones((4, 2)), jnp.ones((4, 3))]
    assert [x.shape for x in stacked(stack, base)] == [(4, 2), (4, 3)]
    assert [x.shape for x in stacked([base, base], base)] == [(2, 2), (2, 3)]
    assert add(base, jax.tree.map(lambda t: t.sum(0), task_vectors(base, stack)))[0].tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "no models: a merge needs at least one"),
        ([{}, {}], "models without a leaf"),
        ({}, "models without a leaf"),
        ({"w": np.zeros((0, 2))}, "no models: the stack's first axis has size 0"),
        ({"w": np.zeros((2, 2)), "b": np.zeros((3, 2))}, "first axes have sizes 2, 3"),
        ({"w": np.zeros(())}, "first axes have sizes None"),
        ([{"w": np.zeros(2)}, {"v": np.zeros(2)}], r"2 of 2 leaves differ\n.*\n  w     float.*\[2\]  0\n.*absent"),
        ([{"w": np.zeros(2)}, {"w": np.zeros(2, np.int32)}], r"float.*\[2\]  0\n.*int32\[2\]    1"),
        ([{"w": [np.zeros(2)]}, {"w": (np.zeros(2),)}], "the same leaves in different containers"),
    ],
)
def test_what_is_no_set_of_models_is_refused(models, message):
    with pytest.raises(MergeInputError, match=message):
        stacked(models)


def test_a_stack_is_compared_with_its_base():
    with pytest.raises(
        MergeInputError, match=r"1 of 1 leaves differ\n.*\n  w     float32\[3\]  base\n.*float32\[2\]  stack"
    ):
        stacked({"w": jnp.zeros((5, 2))}, {"w": jnp.zeros(3)})


def test_long_tables_are_cut_and_long_lists_of_models_counted():
    models = [{str(i): jnp.zeros(2 + (m == 8)) for i in range(20)} for m in range(9)]
    with pytest.raises(MergeInputError) as told:
        stacked(models)
    lines = str(told.value).splitlines()
    assert lines[0].endswith("20 of 20 leaves differ")
    assert lines[2].endswith("0, 1, 2, 3, 4 and 3 more")
    assert lines[-1] == "  and 28 more rows"


def test_floats_of_several_widths_become_the_widest_and_the_bases_dtype_counts():
    models = [{"w": jnp.ones(2, d)} for d in (jnp.bfloat16, jnp.float32, jnp.float16)]
    assert stacked(models)["w"].dtype == jnp.float32
    assert stacked([models[0], models[2]])["w"].dtype == jnp.float32  # neither holds the other
    assert uniform_soup(models[0], models)["w"].dtype == jnp.bfloat16
    assert uniform_soup(None, models)["w"].dtype == jnp.float32


def test_indices_that_are_fixed_are_not_averaged():
    deltas = [{"indices": Fixed(jnp.array([1.0, 2.0])), "values": jnp.full(2, float(i))} for i in range(3)]
    got = uniform_soup(None, deltas)
    assert got["values"].tolist() == [1.0, 1.0]
    assert got["indices"].value.tolist() == [1.0, 2.0]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4), st.floats(-2, 2, width=32))
def test_adding_a_task_vector_gives_the_model_and_its_negative_undoes_it(values, scale):
    base, model = {"w": jnp.array(values[:2])}, {"w": jnp.array(values[2:])}
    tau = jax.tree.map(lambda t: t[0], task_vectors(base, [model]))
    largest = max(map(abs, values))
    np.testing.assert_allclose(add(base, tau)["w"], model["w"], atol=1e-6 * largest)
    back = add(add(base, tau, scale), tau, -scale)
    np.testing.assert_allclose(back["w"], base["w"], atol=1e-5 * largest)


def test_a_task_vector_marks_what_it_lacks():
    base = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(3), "head": jnp.ones(2)}
    tau = task_vectors(base, [base, base], exclude="head")
    assert tau["w"].dtype == jnp.float32
    assert isinstance(tau["n"], trees.Absent)
    assert isinstance(tau["head"], trees.Absent)
    one = jax.tree.map(lambda t: t[0] + 1, tau)
    got = add(base, one, 0.5)
    assert got["w"].tolist() == [1.5, 1.5]
    assert got["w"].dtype == jnp.bfloat16
    assert got["n"] is base["n"]
    with pytest.raises(MergeInputError, match="sum over models first"):
        add(base, tau)
    with pytest.raises(MergeInputError, match="1 leaves for a base of 3"):
        add(base, {"w": one["w"]})
    with pytest.raises(MergeInputError, match="no base"):
        task_vectors(None, [base])


def test_weights_are_numbers_vectors_lists_or_trees():
    models = {"a": jnp.array([[1.0], [2.0]]), "b": {"c": jnp.array([[1.0], [10.0]])}}
    assert weighted_sum(models, [1, -1])["a"].tolist() == [-1.0]
    assert weighted_sum(models, 2.0)["b"]["c"].tolist() == [22.0]
    mixed = soup(None, models, weights={"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 1.0])})
    assert (mixed["a"].tolist(), mixed["b"]["c"].tolist()) == ([1.0], [10.0])
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) for 2 models"):
        weighted_sum(models, jnp.ones(3))


def test_nothing_to_merge_is_told():
    with pytest.raises(MergeInputError, match="no floating-point leaf is left"):
        uniform_soup(None, [{"n": jnp.arange(2)}])
    with pytest.raises(MergeInputError, match="no floating-point leaf is left"):
        uniform_soup(None, [{"w": jnp.ones(2)}], exclude="*")


def test_models_that_are_not_finite_are_named():
    good = {"a": jnp.ones(3), "n": jnp.arange(2)}
    check_finite([good, good], good)
    bad = {**good, "a": jnp.array([1.0, np.nan, np.inf])}
    with pytest.raises(MergeInputError, match=r"1 leaves are not finite.*\n.*\n  a     1      2"):
        check_finite([good, bad], good)
    with pytest.raises(MergeInputError, match="a     base   2"):
        check_finite([good], bad)
