"""What a user may get wrong at the library's front door, and the message that says how to put it right."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxpeft
from jaxpeft.adapt.unified import sublayer

PARAMS = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}, "down": {"kernel": jnp.ones((6, 2))}}
X = jnp.ones((3, 4))


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


METHODS = {
    "lora": jaxpeft.lora(rank=1, at="**/kernel"),
    "dora": jaxpeft.dora(rank=1, at="**/kernel"),
    "ia3": jaxpeft.ia3(at="**/up/kernel", feed_forward="**/down/kernel"),
    "full": jaxpeft.full(at="**/kernel"),
}


def test_a_module_is_no_function_of_parameters():
    with pytest.raises(TypeError, match="Dense is a module, no function of parameters: give its `apply`"):
        jaxpeft.adapt(nn.Dense(3), jaxpeft.lora())
    with pytest.raises(TypeError, match=r"Linear is a module.*from_nnx"):
        jaxpeft.adapt(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jaxpeft.lora())


@pytest.mark.parametrize("given", ["lora", jaxpeft.lora, [jaxpeft.lora(), jaxpeft.bitfit()]])
def test_what_is_no_method_is_refused_where_it_is_given(given):
    for join in (lambda m: jaxpeft.adapt(model, m), jaxpeft.chain):
        with pytest.raises(
            TypeError, match=r"is no method: expected what a factory returns, as jaxpeft.lora\(rank=8\)"
        ):
            join(given)


@pytest.mark.parametrize("rank", [2.0, "8", 0])
def test_a_rank_is_a_whole_number(rank):
    for factory in (jaxpeft.lora, jaxpeft.dora):
        with pytest.raises(ValueError, match=f"rank {rank!r}: a rank is at least 1, and a whole number"):
            factory(rank=rank)


@pytest.mark.parametrize(("mine", "other"), [(m, o) for m in METHODS for o in ("lora", "ia3", "full") if m != o])
def test_a_delta_of_another_method_is_told_as_that(mine, other):
    delta = jaxpeft.adapt(model, METHODS[other]).init(jax.random.key(0), PARAMS, X)
    with pytest.raises(ValueError, match=f"where {mine} wants .*: it is of another method"):
        jaxpeft.adapt(model, METHODS[mine]).apply(PARAMS, delta, X)


def test_tasks_must_be_as_many_as_examples():
    adapted = jaxpeft.adapt(model, jaxpeft.per_task(METHODS["lora"], 2))
    delta = adapted.init(jax.random.key(0), PARAMS, X)
    assert adapted.apply(PARAMS, delta, X, task=jnp.array([0, 1, 1])).shape == (3, 2)
    with pytest.raises(jaxpeft.TaskError, match=r"2 tasks for an input of shape \(3, 4\)"):
        adapted.apply(PARAMS, delta, X, task=jnp.array([0, 1]))


def test_a_prefix_needs_a_module_that_is_called_with_heads():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
    x = jnp.ones((1, 3, 4))
    params = attention.init(jax.random.key(0), x)
    for method in (jaxpeft.prefix_tuning(2, at=""), sublayer("prefix_tuning", at="")):
        with pytest.raises(ValueError, match=r"no attention core: .* shape \(b, t, h, k\)"):
            jaxpeft.adapt(attention.apply, method).init(jax.random.key(1), params, x)


def test_hooks_on_a_function_without_modules_are_refused_with_what_they_need():
    with pytest.raises(jaxpeft.PatternError, match=r"calls no modules .* `from_nnx`"):
        jaxpeft.adapt(model, jaxpeft.houlsby(2)).init(jax.random.key(0), PARAMS, X)


def test_a_setting_that_is_missing_is_told_by_its_name():
    settings = jaxpeft.train.grid(rates=[0.1, 0.2])
    with pytest.raises(jaxpeft.train.SweepError, match=r"no 'rate', for which `make` asks: rates=0.1"):
        jaxpeft.sweep(lambda s: s["rate"], settings, PARAMS, [], steps=1)


def test_rooms_are_attributes_and_a_misspelt_one_is_told():
    names = ["data", "files", "generate", "hyper", "interchange", "merge", "models", "train", "transfer", "tune"]
    code = "import jaxpeft\n" + "\n".join(f"assert jaxpeft.{name}.__name__ == 'jaxpeft.{name}'" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="did you mean 'lora'"):
        jaxpeft.lroa  # noqa: B018
