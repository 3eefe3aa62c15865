"""Readers: marks inside jit, scan and remat, the answer's place, and a backward pass that stays out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import from_nnx, named, read
from jaxpeft.readers import TapError

pytestmark = pytest.mark.usefixtures("quick")
LAYERS, WIDTH = 3, 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return checkpoint_name(x + jnp.tanh(nn.Dense(WIDTH, name="inner")(x)), "hidden"), None


class Net(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            rules = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = nn.scan(block, **rules)(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(name=f"layers_{i}")(x, None)
        return nn.Dense(2, name="head")(checkpoint_name(x, "final"))


def hidden(params, x):
    """The states after each layer, by hand."""
    p, states = params["params"], []
    for i in range(LAYERS):
        layer = jax.tree.map(lambda a: a[i], p["layers"]) if "layers" in p else p[f"layers_{i}"]
        x = x + jnp.tanh(x @ layer["inner"]["kernel"] + layer["inner"]["bias"])
        states.append(x)
    return states


@pytest.fixture(params=["plain", "scan", "remat", "both"])
def net(request, key):
    model = Net(request.param in ("scan", "both"), request.param in ("remat", "both"))
    x = jax.random.normal(key, (2, WIDTH))
    return model, jax.jit(model.init)(key, x), x


def test_taps_are_the_hidden_states_in_order_and_the_output_is_unchanged(net, close):
    model, params, x = net
    out, taps = jax.jit(read(jax.jit(model.apply), ["hidden", "final"]))(params, x)
    close(out, model.apply(params, x))
    close(taps["hidden"], hidden(params, x))
    close(taps["final"], hidden(params, x)[-1:])


def test_gradients_stop_at_the_taps_but_not_on_the_way_through(net):
    model, params, x = net
    by_taps = jax.jit(jax.grad(lambda p: sum(t.sum() for t in read(model.apply, ["hidden"])(p, x)[1]["hidden"])))(
        params
    )
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(by_taps))
    through = jax.jit(jax.grad(lambda p: read(model.apply, ["hidden"])(p, x)[0].sum()))(params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(through))


def test_an_answer_replaces_the_state_and_the_backbone_gets_no_gradient(net, close):
    model, params, x = net

    def run(params, w):
        return read(model.apply, ["hidden"], answer_at="final", answer=lambda t: sum(t["hidden"]) * w)(params, x)[0]

    head = params["params"]["head"]
    close(jax.jit(run)(params, 2.0), 2 * sum(hidden(params, x)) @ head["kernel"] + head["bias"])
    by_params, by_w = jax.jit(jax.grad(lambda p, w: jnp.sum(jnp.sin(run(p, w))), (0, 1)))(params, 2.0)
    assert float(jnp.abs(by_w)) > 0
    for name, part in by_params["params"].items():
        size = sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(part))
        assert (size > 0) == (name == "head"), name


def test_the_backward_pass_never_enters_the_backbone(net):
    """Its products in the gradient's program are those of the forward pass and of the head."""
    model, params, x = net

    def products(text):
        return text.count("dot_general")

    def loss(w, params):
        answer = lambda t: sum(t["hidden"]) * w
        return jnp.sum(read(model.apply, ["hidden"], answer_at="final", answer=answer)(params, x)[0])

    forward = products(jax.jit(loss).lower(2.0, params).compile().as_text())
    backward = products(jax.jit(jax.grad(loss)).lower(2.0, params).compile().as_text())
    whole = jax.grad(lambda w, p: jnp.sum(model.apply(p, x * w)))
    entered = products(jax.jit(whole).lower(2.0, params).compile().as_text())
    assert backward <= forward + 1
    assert entered > backward, "the control: a gradient through the backbone has more"


def test_marks_at_modules_of_a_model_that_has_none(key, close):
    model, x = Net(), jax.random.normal(key, (2, WIDTH))
    params = model.init(key, x)
    _, taps = read(named(model.apply, {"**/inner": "q", "head": "logits"}), ["q", "logits"])(params, x)
    close(taps["logits"], [model.apply(params, x)])
    assert [t.shape for t in taps["q"]] == [(2, WIDTH)] * LAYERS


def test_nnx_modules_are_marked_and_read(key, close):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    model, x = Two(nnx.Rngs(0)), jax.random.normal(key, (2, WIDTH))
    apply_fn, state = from_nnx(model)
    out, taps = jax.jit(read(named(apply_fn, {"a": "a"}), ["a"]))(state, x)
    close(taps["a"], [model.a(x)])
    close(out, model(x))


def test_scans_reversed_unrolled_and_nested_are_read_in_the_order_of_execution(close):
    def model(w, x):
        def outer(x, w):
            step = lambda x, v: (checkpoint_name(x + v, "t"), None)
            return lax.scan(step, x, w, reverse=True, unroll=2)[0], None

        return lax.scan(outer, x, w)[0]

    w = jnp.arange(1.0, 5.0).reshape(2, 2)
    out, taps = read(model, ["t"])(w, 0.0)
    close(out, jnp.asarray(10.0))
    # Reversed inside, forward outside: 2, 2+1, then +4, then +3. The inner scan's taps come stacked by the outer one.
    assert [float(t) for t in taps["t"]] == [2.0, 3.0, 7.0, 10.0]


def test_unknown_marks_marks_in_branches_and_misshapen_answers_are_refused(key):
    model, x = Net(), jnp.ones((2, WIDTH))
    params = model.init(key, x)
    with pytest.raises(TapError, match=r"marks no 'hiden'; it marks \['final', 'hidden'\]"):
        read(model.apply, ["hiden"])(params, x)
    with pytest.raises(TapError, match="marks no 'a'; it marks nothing"):
        read(lambda p, x: x, ["a"])(params, x)
    branch = lambda p, x: lax.cond(x.sum() > 0, lambda x: checkpoint_name(x, "a"), lambda x: x, x)
    with pytest.raises(TapError, match="stands inside 'cond'"):
        read(branch, ["a"])(params, x)
    with pytest.raises(TapError, match=r"shape \(1,\).*\(2, 4\)"):
        read(model.apply, ["hidden"], answer_at="final", answer=lambda t: jnp.ones(1))(params, x)
    scanned = Net(scan=True)
    with pytest.raises(TapError, match="stands inside a scan"):
        read(scanned.apply, [], answer_at="hidden", answer=lambda t: x)(scanned.init(key, x), x)


def test_a_reader_of_an_adapted_model_reads_the_adapted_states(key, close):
    from jaxpeft import adapt, lora

    model, x = Net(), jax.random.normal(key, (2, WIDTH))
    params = model.init(key, x)
    adapted = adapt(model.apply, lora(2, at="**/inner/kernel"), on_dense="refuse")
    delta = jax.tree.map(lambda a: a + 0.1, adapted.init(key, params, x))
    _, taps = jax.jit(read(adapted.apply, ["hidden"]))(params, delta, x)
    close(taps["hidden"], hidden(adapted.merge(params, delta), x))


# ------------------------------------------------------------------------------------------- one pass of a mark answered


def nested(w, x):
    """Adds 2, 1, 4, 3 to x, and gives back twice each."""

    def outer(x, w):
        step = lambda x, v: (checkpoint_name(x + v, "t"), 2 * v)
        return jax.lax.scan(step, x, w, reverse=True, unroll=2)

    return jax.lax.scan(outer, x, w)


@pytest.mark.parametrize("number", [0, 1, 2, 3, -1, -4])
def test_one_pass_is_answered_in_the_turns_of_nested_and_reversed_scans(number, close):
    w, added = jnp.arange(1.0, 5.0).reshape(2, 2), [2.0, 1.0, 4.0, 3.0]
    answer = lambda taps: 100 + 0 * sum(taps["t"])
    (x, ys), taps = jax.jit(read(nested, ["t"], answer_at=("t", number), answer=answer))(w, jnp.asarray(0.0))
    at = number % 4
    assert float(x) == 100 + sum(added[at + 1 :])
    close(ys, 2 * w)
    # Every pass is read, the one that was answered as it would have been.
    before = list(np.cumsum(added[: at + 1]))
    assert [float(t) for t in taps["t"]] == before + list(100 + np.cumsum(added[at + 1 :]))


def test_the_answer_sees_what_it_replaces_and_what_was_before_it():
    seen = []
    answer = lambda taps: seen.append(len(taps["t"])) or taps["t"][-1] + 1
    (x, _), _ = read(nested, ["t"], answer_at=("t", 2), answer=answer)(jnp.ones((2, 2)), jnp.asarray(0.0))
    assert (float(x), seen) == (5.0, [3])
    slope = jax.grad(lambda v: read(nested, ["t"], answer_at=("t", 2), answer=lambda _: v)(jnp.ones((2, 2)), 0.0)[0][0])
    assert float(slope(3.0)) == 1


def test_a_pass_that_there_is_not_is_refused():
    for number in (4, -5):
        with pytest.raises(TapError, match=rf"passes 't' 4 times: there is no pass {number}"):
            read(nested, ["t"], answer_at=("t", number), answer=lambda taps: 0.0)(jnp.ones((2, 2)), jnp.asarray(0.0))
