"""Laws of paths, patterns, partitions, stacks and identities."""

import fnmatch
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import trees
from jaxpeft.trees import (
    Absent,
    Fixed,
    PatternError,
    by_path,
    combine,
    count,
    fingerprint,
    is_match,
    labels,
    learned,
    matches,
    mix,
    nbytes,
    partition,
    replace_leaves,
    stack,
    unmark,
    unstack,
)

SEGMENTS = ["layers_0", "layers_1", "attention", "query", "key", "kernel", "bias", "a.b", "x+y"]
segment = st.sampled_from(SEGMENTS)
path = st.lists(segment, min_size=1, max_size=4).map("/".join)
word = st.text("abk_", min_size=1, max_size=4)


@pytest.fixture
def tree():
    return {
        "params": {
            "layers_0": {"attention": {"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}},
            "layers_1": {"attention": {"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}},
        },
        "steps": [jnp.arange(2), jnp.arange(3)],
    }


# ------------------------------------------------------------------------------------------------------------ patterns


@given(path)
def test_a_path_without_wildcards_matches_itself_alone(p):
    assert is_match(p, p)
    assert not is_match(p, f"{p}/more")
    assert not is_match(p, f"more/{p}")


@given(path)
def test_two_stars_match_every_path_and_any_suffix_of_it(p):
    parts = p.split("/")
    assert is_match("**", p)
    for i in range(len(parts)):
        assert is_match("/".join(["**", *parts[i:]]), p)
        assert is_match("/".join([*parts[: i + 1], "**"]), p)
    assert is_match(f"**/{p}", p), "`**/` may stand for no segment"
    assert is_match(f"{p}/**", p), "`/**` may stand for no segment"
    assert is_match(f"**/{p}/**", p)


@given(path, st.integers(0, 3))
def test_one_star_never_crosses_a_slash(p, i):
    parts = p.split("/")
    i %= len(parts)
    starred = "/".join(["*" if j == i else s for j, s in enumerate(parts)])
    assert is_match(starred, p)
    assert is_match("*", p) == (len(parts) == 1)
    assert not is_match(starred, "/".join([*parts[:i], "x", "y", *parts[i + 1 :]]))


@given(st.text("ab*?", max_size=5), st.text("abc", min_size=1, max_size=5))
def test_within_one_segment_a_glob_is_a_shell_glob(pattern, name):
    pattern = pattern.replace("**", "*")
    while "**" in pattern:
        pattern = pattern.replace("**", "*")
    assert is_match(pattern, name) == fnmatch.fnmatchcase(name, pattern)


@given(word, st.lists(word, min_size=1, max_size=3), word, st.lists(path, max_size=4))
def test_alternatives_expand_to_a_union(before, choices, after, others):
    braces = f"{before}{{{','.join(choices)}}}{after}"
    among = [before + c + after for c in choices] + others
    for p in among:
        assert is_match(braces, p) == any(is_match(before + c + after, p) for c in choices)


def test_alternatives_nest_and_hold_globs():
    pattern = "**/{attention/{query,value},mlp/*}/kernel"
    flat = ["**/attention/query/kernel", "**/attention/value/kernel", "**/mlp/*/kernel"]
    paths = [
        f"{a}/{b}/{c}/kernel" for a, b, c in itertools.product(("x", "x/y"), ("attention", "mlp"), ("query", "up"))
    ]
    for p in paths:
        assert is_match(pattern, p) == any(is_match(q, p) for q in flat), p


def test_other_characters_stand_for_themselves():
    assert is_match("a.b", "a.b")
    assert not is_match("a.b", "axb")
    assert is_match("x+y", "x+y")
    assert is_match("a,b", "a,b"), "a comma outside braces"
    assert is_match("[ab]", "[ab]")
    assert is_match("a?c", "abc")
    assert not is_match("a?c", "a/c")


@given(st.lists(path, min_size=1, max_size=8, unique=True), st.data())
def test_a_negation_takes_out_exactly_what_it_matches(paths, data):
    out = data.draw(st.sampled_from(paths))
    rest = [p for p in paths if p != out]
    if not rest:
        with pytest.raises(PatternError, match="leave no leaf"):
            matches(["**", f"!{out}"], paths)
    else:
        assert matches(["**", f"!{out}"], paths) == rest
        assert matches([f"!{out}"], paths) == rest, "a leading negation starts from everything"
        assert matches(["**", f"!{out}", out], paths) == paths, "the last word counts"


@given(st.lists(path, min_size=1, max_size=8, unique=True), st.data())
def test_matches_keeps_the_order_of_paths_and_agrees_with_is_match(paths, data):
    pattern = data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3))
    chosen = matches(pattern, paths)
    assert chosen == [p for p in paths if is_match(pattern, p)]


def test_a_pattern_that_matches_nothing_names_near_misses():
    paths = ["params/layers_0/attention/query/kernel", "params/layers_0/mlp/up/kernel"]
    with pytest.raises(PatternError, match=r"querry.*matches no leaf.*near misses: '.*query/kernel'.*of 2"):
        matches("**/querry/kernel", paths)
    with pytest.raises(PatternError, match="there are none"):
        matches("**", [])
    with pytest.raises(PatternError, match=r"matches no parameter"):
        matches("zzz", paths, "parameter")


def test_a_negation_that_matches_nothing_is_refused_too():
    with pytest.raises(PatternError, match="'!b' matches no leaf"):
        matches(["a", "!b"], ["a"])


def test_an_unclosed_brace_and_an_empty_sequence_are_refused():
    with pytest.raises(PatternError, match="brace"):
        matches("a/{b,c", ["a/b"])
    with pytest.raises(PatternError, match="empty"):
        matches([], ["a"])
    assert not is_match([], "a")


# --------------------------------------------------------------------------------------------------------------- paths


def test_containers_read_alike(tree):
    assert next(iter(by_path(tree))) == "params/layers_0/attention/query/bias"
    assert list(by_path(tree))[-2:] == ["steps/0", "steps/1"]
    state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[1]
    assert sorted(by_path(state)) == ["bias", "kernel"]


def test_replacing_leaves_changes_these_and_no_others(tree):
    at = "params/layers_1/attention/query/bias"
    new = replace_leaves(tree, {at: jnp.full(3, 7.0)})
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    for p, x in by_path(new).items():
        assert (x is by_path(tree)[p]) == (p != at)
    with pytest.raises(KeyError, match=r"layers_2.*did you mean"):
        replace_leaves(tree, {"params/layers_2/attention/query/bias": 0})


# --------------------------------------------------------------------------------------------------------- partitions

leaves = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 99), max_size=6)
nested = st.dictionaries(st.sampled_from("pqr"), leaves, max_size=3)


@given(nested, st.sets(st.sampled_from("abcdef")))
def test_combine_undoes_partition_in_either_order(tree, names):
    yes, no = partition(tree, lambda p, x: p[-1] in names)
    assert combine(yes, no) == tree
    assert combine(no, yes) == tree
    assert len(jax.tree.leaves(yes)) + len(jax.tree.leaves(no)) == len(jax.tree.leaves(tree))


def test_maps_and_optimisers_pass_over_absent_leaves(tree):
    floats, ints = partition(tree, lambda p, x: jnp.issubdtype(x.dtype, jnp.floating))
    assert count(floats) == 18
    assert count(ints) == 5
    assert isinstance(floats["steps"][0], Absent)
    assert repr(floats["steps"][0]) == "Absent(int32[2])"
    state = optax.adam(1e-3).init(floats)
    assert count(state[0].mu) == 18
    assert combine(jax.tree.map(lambda x: 2 * x, floats), ints)["steps"][1].tolist() == [0, 1, 2]


def test_combine_names_the_leaf_that_is_missing_or_doubled(tree):
    yes, _ = partition(tree, lambda p, x: p.startswith("steps"))
    with pytest.raises(ValueError, match=r"'params/layers_0/attention/query/bias' is in neither half"):
        combine(yes, yes)
    with pytest.raises(ValueError, match="'a' is in both halves"):
        combine({"a": 1}, {"a": 1})
    with pytest.raises(ValueError, match="different trees"):
        combine({"a": 1}, {"a": Absent("x"), "b": 2})


def test_learned_leaves_are_inexact_and_not_fixed():
    delta = {"a": jnp.ones(2), "seed": jnp.arange(3), "table": Fixed(jnp.ones(4)), "h": jnp.ones(2, jnp.bfloat16)}
    yes, no = learned(delta)
    assert sorted(by_path(yes)) == ["a", "h"]
    assert count(no) == 7
    whole = combine(yes, no)
    assert isinstance(whole["table"], Fixed)
    assert trees.by_path(whole).keys() == trees.by_path(delta).keys()


def test_unmarked_fixed_leaves_have_no_gradient():
    delta = {"a": jnp.ones(2), "t": Fixed(jnp.ones(2))}
    grads = jax.grad(lambda d: sum(x.sum() for x in jax.tree.leaves(unmark(d))))(delta)
    assert grads["a"].tolist() == [1, 1]
    assert grads["t"].value.tolist() == [0, 0]


def test_labels_take_the_first_rule_that_chooses_a_leaf():
    tree = {"x": {"a": 1, "b": 2}, "y": {"a": 3}, "z": 4}
    got = labels(tree, {"fast": "**/b", "slow": "*/*"}, default="rest")
    assert got == {"x": {"a": "slow", "b": "fast"}, "y": {"a": "slow"}, "z": "rest"}
    with pytest.raises(PatternError, match="near misses"):
        labels(tree, {"fast": "**/bb"})


# -------------------------------------------------------------------------------------------------------------- stacks


@given(st.integers(1, 4), st.lists(st.integers(0, 3), max_size=2))
def test_unstack_undoes_stack(n, shape):
    made = [{"a": np.full(shape, i, np.float32), "b": [np.arange(2) + i]} for i in range(n)]
    again = unstack(stack(made))
    assert len(again) == n
    for x, y in zip(made, again):
        jax.tree.map(np.testing.assert_array_equal, x, y)


def test_stacking_refuses_nothing_and_strangers():
    with pytest.raises(ValueError, match="empty"):
        stack([])
    with pytest.raises(ValueError, match=r"tree 1 differs.*\['a'\].*\['b'\]"):
        stack([{"a": 1.0}, {"b": 1.0}])
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        unstack({"a": jnp.ones(2), "b": jnp.ones(3)})


def test_mix_of_a_one_hot_row_is_a_choice_and_mix_is_linear(key):
    made = [{"a": jax.random.normal(k, (2, 3)), "b": jax.random.normal(k, ())} for k in jax.random.split(key, 3)]
    stacked = stack(made)
    for i, tree in enumerate(made):
        got = mix(stacked, jnp.eye(3)[i])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, tree)
    c = jnp.array([0.5, -1.0, 2.0])
    want = jax.tree.map(lambda x, y, z: 0.5 * x - y + 2 * z, *made)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), mix(stacked, c), want)
    per_example = jax.vmap(mix, (None, 0))(stacked, jnp.stack([c, 2 * c]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], 2 * y, atol=1e-6), per_example, want)


def test_mix_keeps_the_dtype_of_leaves():
    assert mix({"a": jnp.ones((2, 3), jnp.bfloat16)}, jnp.ones(2))["a"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------------ sizes, identity


def test_counts_and_bytes_know_shapes_without_values():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones((), jnp.bfloat16), "c": jnp.ones((0, 5))}
    shapes = jax.eval_shape(lambda: tree)
    assert count(tree) == count(shapes) == 7
    assert nbytes(tree) == nbytes(shapes) == 26
    assert count({}) == nbytes({}) == 0


def test_a_fingerprint_is_of_paths_and_shapes_only(tree):
    first = fingerprint(tree)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert first == fingerprint(jax.tree.map(lambda x: 3 * x.astype(jnp.float16), tree))
    assert first == fingerprint(jax.eval_shape(lambda: tree))
    assert first == fingerprint(dict(reversed(tree.items())))
    assert first != fingerprint(tree["params"])
    at = "params/layers_0/attention/query/bias"
    assert first != fingerprint(replace_leaves(tree, {at: jnp.zeros(4)}))
    assert fingerprint({"a": jnp.ones((2, 3))}) != fingerprint({"b": jnp.ones((2, 3))})
