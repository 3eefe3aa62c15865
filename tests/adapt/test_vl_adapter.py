"""VL-Adapter: the card's oracles, and the numbers of the reference code."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, bake, chain, full, head, per_task, trees, vl_adapter
from jaxpeft.files import load_delta, save_delta
from jaxpeft.models import EncoderDecoder, EncoderDecoderConfig, SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.models.layers import BlockConfig, Mlp

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "vl-adapter" / "golden.safetensors")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
T, RANK = 3, 2


class Nothing(nn.Module):
    """A sub-layer that gives its input: what comes out is u + A(u)."""

    @nn.compact
    def __call__(self, x):
        return x


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Nothing(name="attention")(x)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), IDS, MASK)


def moved(delta, seed=1, by=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


def started(params, method):
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    return adapted, jax.jit(adapted.init)(jax.random.key(2), params, IDS, MASK)


def recorded(case, task):
    """One task's arrays, named and laid out as ours; torch lists shared ones under the first task."""
    held = {k.removeprefix(f"{case}.parameters."): v for k, v in GOLDEN.items() if k.startswith(f"{case}.parameters.")}
    find = lambda name: held.get(f"adapters.{task}.{name}", held.get(f"adapters.a.{name}"))
    out = {}
    for side in ("down", "up"):
        out[side] = find(f"{side}_sampler.weight").T
        out[f"{side}_bias"] = find(f"{side}_sampler.bias")
    for order in ("pre", "post"):
        if f"{order}_layer_norm.weight" in held:
            out |= {f"norm_{n}": held[f"{order}_layer_norm.{w}"] for n, w in (("scale", "weight"), ("bias", "bias"))}
    return out


CASES = {
    "multiple": dict(share="multiple"),
    "single": dict(share="single"),
    "half_down": dict(share="half_down"),
    "half_up": dict(share="half_up"),
    "norm_in": dict(share="multiple", norm="in"),
    "norm_out": dict(share="multiple", norm="out"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mode_is_that_of_the_reference(case, close):
    u = jnp.asarray(GOLDEN["adapter.input"])
    adapted = adapt(Net().apply, vl_adapter(reduction=2, tasks=2, at="attention", **CASES[case]))
    ((place, shapes),) = jax.eval_shape(adapted.init, jax.random.key(0), {}, u).items()
    a, b = (recorded(f"adapter.{case}", t) for t in "ab")
    # Where a task has its own, the tasks' arrays are stacked in front; there are no stacked layers here.
    own = {n: np.stack([a[n], b[n]]) if s.ndim > a[n].ndim else a[n] for n, s in shapes.items()}
    assert {n: x.shape for n, x in own.items()} == {n: s.shape for n, s in shapes.items()}
    for t, name in enumerate("ab"):
        got = adapted.apply({}, {place: jax.tree.map(jnp.asarray, own)}, u, task=t)
        close(got, jnp.asarray(GOLDEN[f"adapter.{case}.output.{name}"]))


@pytest.mark.parametrize(
    ("share", "own"), [("multiple", {"down", "up"}), ("single", set()), ("half_down", {"up"}), ("half_up", {"down"})]
)
def test_what_a_task_has_of_its_own_has_an_axis_of_tasks(params, share, own):
    _, delta = started(params, vl_adapter(RANK, T, share))
    sizes = {"down": (8, RANK), "down_bias": (RANK,), "up": (RANK, 8), "up_bias": (8,)}
    for named in delta.values():
        for name, size in sizes.items():
            assert named[name].shape == ((T, *size) if name.split("_")[0] in own else size)
    if own:
        side = next(iter(own))
        assert all((named[side][0] != named[side][1]).any() for named in delta.values())


def test_multiple_with_equal_adapters_is_single_and_gradients_add_up(params, close):
    single, delta = started(params, vl_adapter(RANK, T, "single"))
    multiple, _ = started(params, vl_adapter(RANK, T, "multiple"))
    delta = moved(delta)
    copies = {p: {n: jnp.broadcast_to(x, (T, *x.shape)) for n, x in d.items()} for p, d in delta.items()}
    tasks = jnp.array([0, 1, 2, 1])
    loss = lambda adapted: lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, IDS, MASK, task=tasks)))
    value, shared = jax.jit(jax.value_and_grad(loss(single)))(delta)
    same, own = jax.jit(jax.value_and_grad(loss(multiple)))(copies)
    close(value, same)
    close(shared, jax.tree.map(lambda g: g.sum(0), own))


def test_the_start_is_the_papers_and_lora_starts_at_the_base(params, close):
    wide = SequenceClassifier(EncoderConfig(**{**CONFIG.__dict__, "width": 64, "head_dim": 32}), 3)
    shapes = jax.eval_shape(wide.init, jax.random.key(0), IDS, MASK)
    delta = adapt(wide.apply, vl_adapter(tasks=T, share="multiple")).init(jax.random.key(0), shapes, IDS, MASK)
    for name in ("down", "up"):
        every = jnp.concatenate([d[name].ravel() for d in delta.values()])
        assert float(every.std()) == pytest.approx(0.02, rel=0.05)
    assert all((d[n] == 0).all() for d in delta.values() for n in ("down_bias", "up_bias"))
    assert {d["down"].shape for d in delta.values()} == {(T, 64, 8)}
    adapted, delta = started(params, vl_adapter(RANK, init="lora"))
    close(adapted.apply(params, delta, IDS, MASK), MODEL.apply(params, IDS, MASK))


def test_bart_base_has_thirty_adapters_of_the_papers_size():
    config = EncoderDecoderConfig(
        vocab=10, width=768, layers=6, decoder_layers=6, heads=12, head_dim=64, mlp_width=3072, activation="relu"
    )
    model, ids = EncoderDecoder(config), jnp.ones((1, 3), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids)
    for share, times in (("single", 1), ("multiple", 4)):
        adapted = adapt(model.apply, vl_adapter(tasks=4, share=share))
        delta = jax.eval_shape(adapted.init, jax.random.key(0), shapes, ids, ids)
        assert len(delta) == 6 * 2 + 6 * 3
        assert trees.count(delta) == times * 30 * (2 * 768 * 96 + 96 + 768) == times * 4_449_600
    ends = {p.split("layers_0/")[1] for p in delta if "layers_0" in p}
    assert ends == {"attention", "cross_attention", "mlp/down"}


def test_it_stands_before_dropout_and_keeps_the_sublayers_output(key, close):
    config = BlockConfig(width=8, layers=1, heads=1, head_dim=8, mlp_width=16, dropout=0.5, init_std=0.3, plain=True)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic=True):
            return Mlp(config, name="mlp")(x, deterministic)

    x = jax.random.normal(key, (2, 3, 8))
    params = Block().init(key, x)
    adapted = adapt(Block().apply, vl_adapter(RANK, at="mlp/down"))
    delta = moved(adapted.init(key, params, x))
    ((place, p),) = delta.items()
    assert place == "params/mlp/down"
    u = Block().apply(params, x)
    # The tanh approximation, to 1e-3 the exact one: told apart by the tolerance.
    want = u + jax.nn.gelu(u @ p["down"] + p["down_bias"], approximate=True) @ p["up"] + p["up_bias"]
    close(adapted.apply(params, delta, x), want)
    dropped = adapted.apply(params, delta, x, deterministic=False, rngs={"dropout": key})
    plain = Block().apply(params, x, deterministic=False, rngs={"dropout": key})
    assert ((dropped == 0) == (plain == 0)).all()
    close(dropped[dropped != 0], 2 * want[dropped != 0])


def test_a_batch_of_several_tasks_and_a_traced_task_give_each_its_own(params, close, counted):
    method = chain(vl_adapter(RANK, T, "half_down"), full("**/*norm/*", name="norms"), per_task(head(), T))
    adapted, delta = started(params, method)
    delta = moved(delta)
    once = counted(lambda task: adapted.apply(params, delta, IDS, MASK, task=task))
    run = jax.jit(once)
    alone = [run(jnp.int32(t)) for t in range(T)]
    assert len(once.traces) == 1
    assert not np.allclose(alone[0], alone[1])
    tasks = np.array([2, 0, 1, 2])
    mixed = adapted.apply(params, delta, IDS, MASK, task=jnp.asarray(tasks))
    close(mixed, jnp.stack([alone[t][i] for i, t in enumerate(tasks)]))
    simple, own = bake(adapted.method, delta, 1)
    close(adapt(MODEL.apply, simple).apply(params, own, IDS, MASK), alone[1])
    assert own["vl_adapter"]["params/backbone/layers_0/attention"]["up"].shape == (RANK, 8)


def test_its_file_makes_it_again(params, tmp_path, close):
    method = vl_adapter(RANK, T, "half_up", norm="in")
    adapted, delta = started(params, method)
    save_delta(tmp_path / "d", moved(delta), method, params)
    saved = load_delta(tmp_path / "d", params)
    again = adapt(MODEL.apply, saved.method)
    close(again.apply(params, saved.delta, IDS, MASK, task=2), adapted.apply(params, moved(delta), IDS, MASK, task=2))


def test_what_has_no_meaning_is_refused(params):
    for wrong, words in (
        (dict(tasks=0), "tasks 0: there is at least one"),
        (dict(share="half"), "share 'half': expected one of multiple, single"),
        (dict(norm="both"), "norm 'both'"),
        (dict(init="zero"), "init 'zero'"),
        (dict(reduction=0), "reduction 0"),
        (dict(rank=0), "rank 0"),
    ):
        with pytest.raises(ValueError, match=words):
            vl_adapter(**wrong)
    with pytest.raises(ValueError, match="reduction 16 leaves nothing of a width of 8"):
        started(params, vl_adapter(reduction=16))
