"""Self-tuning networks, STN (MacKay, Vicol, Lorraine, Duvenaud, Grosse, ICLR 2019).

One training run that tunes its own regularisers. Each layer's weights are an affine function of the unconstrained
hyperparameters λ, a response to them, with a gate on every output:

    Ŵ(u) = s W_e + diag(V_w u) W_h        b̂(u) = s b_e + (V_b u) ⊙ b_h              E(i) = E_e[i] + (V u) ⊙ E_h[i]

The response is trained at λ̃ = λ + softplus(ξ) ε, drawn for each example, with the regularisers of λ̃; then λ goes down the
validation loss through the response alone. So dropout rates and the sizes of holes are tuned, in which the training loss has
no slope. Two kinds of step, each for its own parameters, with three optimisers:

    training     min_φ     E_ε L_T(λ̃, ŵ_φ(λ̃))                                 regularisers on; λ, ξ as they are
    validation   min_λ,ξ   E_ε L_V(ŵ_φ(λ̃)) - τ H(ξ)                            regularisers off; φ as it is

At the end Ŵ(λ), b̂(λ) are an ordinary network (`apply`).

Letters: n hyperparameters, b examples; φ all of a response's parameters, s the scale of its elementary branch, V its gates.

Reference code: asteroidhouse/self-tuning-networks @ 3c42049 (stn_utils, cnn/hypermodels, lstm/hyperlstm.py). Departure: with
`centre`, u = λ̃ - λ_0, as later work proposes (Bae, Grosse, NeurIPS 2020); without it the gated branch acts at ε = 0 too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.hyper.hypernetwork import (
    Hypernetwork,
    TargetError,
    as_spec,
    bias_of,
    output_shape,
    per_example,
    register_hypernetwork,
    stacked_paths,
)
from jaxpeft.tune.hyperparameters import Specs, constrain, entropy, inverse_softplus, perturb, unconstrain
from jaxpeft.weights.factored import Factor, Factored, Term, names

__all__ = ["Responding", "Tuner", "Tuning", "cutout", "dropout", "self_tuning", "stn"]

GATE_STD = 0.01
EMBEDDINGS = 0.1  # their start is uniform within


# ----------------------------------------------------------------------------------------------------------- the response


@register_hypernetwork(paper="MacKay et al., ICLR 2019")
def stn(
    init_fn: Callable[[Key[Array, ""]], PyTree],
    hyperparameters: int,
    *,
    at: trees.Pattern = "**/kernel",
    embeddings: trees.Pattern | None = None,
    scale: bool = True,
    stacked: trees.Pattern | None = None,
) -> Hypernetwork:
    """Any model with layers that respond to hyperparameters.

    Args:
      init_fn: `key -> params`, the model's own initialisation.
      hyperparameters: n; 0 is the model itself.
      at: pattern of the kernels of linear, convolutional and recurrent layers, outputs on their last axes: as many as the
        bias beside one has, else one. A kernel's bias responds along.
      embeddings: pattern of tables (v, d) that respond, d gates.
      scale: whether layers have s, a number that starts at 1 (in the reference: convolutional networks do, LSTMs do not).
      stacked: pattern of leaves whose first axis counts layers (of a scanned model); each has gates and s of its own.

    Returns:
      A hypernetwork: `apply(weights, u)` takes u (n,) and returns ordinary parameters; `per_example(apply_fn, hyper)` runs a
      batch with u (b, n), at the cost of two products a layer.

      weights: {"elementary": {path: array}, "response": {path: array}, "gates": {path: (*layers, *outputs, n)}, "scale":
      {path: layers}}. Starts: kernels and biases U(±1 / √fan-in) in both branches, tables U(±0.1), gates N(0, 0.01²), all else
      by `init_fn`, under "elementary".

    Raises:
      PatternError: nothing matches a pattern. TargetError: a chosen leaf that is not floating point.
      ValueError: hyperparameters under 0; in `apply` another u.
    """
    if hyperparameters < 0:
        raise ValueError(f"{hyperparameters} hyperparameters")
    spec = as_spec(jax.eval_shape(init_fn, jax.random.key(0)))
    flat = trees.by_path(spec)
    kernels = trees.matches(at, flat, "parameter")
    tables = [] if embeddings is None else trees.matches(embeddings, flat, "parameter")
    layers = stacked_paths(spec, stacked)
    biases = {k: b for k in kernels if (b := bias_of(k, flat)) is not None}
    # The output axes of a response, which are those that its gates have.
    outputs = {k: output_shape(k, flat, layers) for k in kernels}
    outputs |= {b: outputs[k] for k, b in biases.items()}
    outputs |= {t: flat[t].shape[-1:] for t in tables}
    for path in outputs:
        if not trees.is_learned(path, flat[path]):
            raise TargetError(f"{path!r} is {flat[path].dtype}, which cannot respond: leave it out of the pattern")
    bound = {}
    for k in kernels:
        fan_in = np.prod(flat[k].shape[k in layers :]) / np.prod(outputs[k])
        bound |= dict.fromkeys([k, *([biases[k]] if k in biases else [])], float(fan_in) ** -0.5)
    bound |= dict.fromkeys(tables, EMBEDDINGS)
    lead = {path: flat[path].shape[: int(path in layers)] for path in outputs}
    scaled = [path for path in outputs if path not in tables] if scale else []

    def init(key: Key[Array, ""]) -> PyTree:
        own, elementary, response, gates = jax.random.split(key, 4)
        uniform = lambda key: {
            p: jax.random.uniform(k, flat[p].shape, flat[p].dtype, -bound[p], bound[p])
            for p, k in zip(outputs, jax.random.split(key, len(outputs)))
        }
        gate = {
            p: GATE_STD * jax.random.normal(k, (*lead[p], *outputs[p], hyperparameters))
            for p, k in zip(outputs, jax.random.split(gates, len(outputs)))
        }
        return {
            "elementary": trees.by_path(init_fn(own)) | uniform(elementary),
            "response": uniform(response),
            "gates": gate,
            "scale": {_module(p): jnp.ones(lead[p]) for p in scaled},
        }

    def emit(weights: PyTree, u: Any, factored: bool) -> PyTree:
        u = jnp.asarray(u)
        if u.shape != (hyperparameters,):
            raise ValueError(
                f"u of shape {u.shape} for {hyperparameters} hyperparameters: a batch goes through vmap or `per_example`"
            )

        def leaf(path: str) -> Any:
            w = weights["elementary"][path]
            if path not in outputs:
                return w
            gate = (weights["gates"][path] @ u).astype(w.dtype)
            s = weights["scale"][_module(path)] if path in scaled else jnp.ones(lead[path])
            value = _response(w, s.astype(w.dtype), weights["response"][path], gate, len(outputs[path]))
            return value if factored and path not in biases.values() else value.dense()

        return jtu.tree_unflatten(jtu.tree_structure(spec), [leaf(p) for p in flat])

    config = {
        "hyperparameters": hyperparameters,
        "at": at,
        "embeddings": embeddings,
        "scale": scale,
        "stacked": stacked,
    }
    return Hypernetwork("stn", init, lambda w, u: emit(w, u, False), spec, config, lambda w, u: emit(w, u, True))


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _response(w: Array, s: Array, h: Array, gate: Array, outputs: int) -> Factored:
    """s w + gate ⊙ h, gated along the last axes, with a stack's axis in front of `s` and `gate`."""
    axes = names(w.ndim)
    stack = axes[: s.ndim]
    own = (Term((Factor(w, axes), Factor(s, stack))), Term((Factor(h, axes), Factor(gate, stack + axes[-outputs:]))))
    return Factored(own, (), tuple(axes))


# ---------------------------------------------------------------------------------------------------------------- tuning


class Responding(NamedTuple):
    """The model at the hyperparameters of a batch, as the losses get it.

    Attributes:
      apply: `(*inputs) -> outputs`, each example with weights of its own.
      params: `() -> params`, the weights of the first example, for penalties: what a batch shares is its.
    """

    apply: Callable[..., Any]
    params: Callable[[], PyTree]


class Tuning(NamedTuple):
    """The state of a run.

    Attributes:
      weights: φ, of `stn`.
      lam, xi: λ (n,), and the noise's scales before softplus (n,).
      moments: of the three optimisers.
    """

    weights: PyTree
    lam: Float[Array, "n"]
    xi: Float[Array, "n"]
    moments: tuple[PyTree, PyTree, PyTree]


class Tuner(NamedTuple):
    """What `self_tuning` makes: pure functions.

    Attributes:
      init: `(key) -> Tuning`.
      train_step: `(state, batch, key) -> (state, loss)`.
      valid_step: `(state, batch, key) -> (state, loss)`.
      cycle: `(state, train batches, validation batches, key) -> (state, (losses, losses, values))`: as many training steps
        and then validation steps as there are batches on the leading axes, as two scans; values (n,) are those at the end.
      params: `(state) -> params`, the ordinary network at λ.
      values: `(state) -> {name: value}`.
    """

    init: Callable[..., Tuning]
    train_step: Callable[..., tuple[Tuning, Array]]
    valid_step: Callable[..., tuple[Tuning, Array]]
    cycle: Callable[..., Any]
    params: Callable[[Tuning], PyTree]
    values: Callable[[Tuning], dict[str, Array]]


def self_tuning(
    apply_fn: Callable[..., Any],
    hyper: Hypernetwork,
    specs: Specs,
    *,
    train_loss: Callable[..., Array],
    valid_loss: Callable[..., Array],
    optimisers: tuple[optax.GradientTransformation, optax.GradientTransformation, optax.GradientTransformation],
    scale: float = 0.5,
    tau: Any = 1e-3,
    tune_scales: bool = True,
    centre: bool = False,
) -> Tuner:
    """The two kinds of step.

    Args:
      apply_fn: the model, `(params, *inputs)`, examples on all leading axes.
      hyper: `stn` of it, for as many hyperparameters as `specs` has.
      specs: what is tuned; their order is λ's.
      train_loss: `(model, batch, values, key) -> scalar`: `model` is a `Responding`, `values` {name: (b,)} the regularisers'
        strengths, without a slope.
      valid_loss: `(model, batch) -> scalar`, without regularisers, dropout or augmentation.
      optimisers: of φ, λ and ξ. Reference: SGD of momentum 0.9 at 0.01; Adam at 3e-3 for both others.
      scale: softplus(ξ) at the start.
      tau: the entropy's weight; may be traced. In the reference 1e-5 to 1e-1.
      tune_scales: whether ξ moves; without, validation is at ε = 0.
      centre: whether responses read λ̃ - λ_0.

    Raises:
      ValueError: no hyperparameters, a start outside of its bounds, or `hyper` for another number.
    """
    first = unconstrain(specs)
    if hyper.config.get("hyperparameters") != len(specs):
        raise ValueError(
            f"responses to {hyper.config.get('hyperparameters')} hyperparameters, and {len(specs)} of them to tune"
        )
    run = per_example(apply_fn, hyper)
    origin = first if centre else jnp.zeros_like(first)
    of_weights, of_lam, of_xi = optimisers

    def init(key: Key[Array, ""]) -> Tuning:
        weights, xi = hyper.init(key), jnp.full(len(specs), inverse_softplus(scale))
        return Tuning(weights, first, xi, (of_weights.init(weights), of_lam.init(first), of_xi.init(xi)))

    def named_values(noisy: Array) -> dict[str, Array]:
        values = constrain(specs, noisy)
        return {name: values[..., i] for i, name in enumerate(specs)}

    def model(weights: PyTree, noisy: Array) -> Responding:
        apply = lambda *inputs: run(weights, noisy - origin, *inputs)
        return Responding(apply, lambda: hyper.apply(weights, noisy[0] - origin))

    def train_step(state: Tuning, batch: Any, key: Key[Array, ""]) -> tuple[Tuning, Array]:
        noise, rest = jax.random.split(key)
        noisy = jax.lax.stop_gradient(perturb(noise, specs, state.lam, state.xi, _examples(batch)))
        loss = lambda w: train_loss(model(w, noisy), batch, named_values(noisy), rest)
        value, grads = jax.value_and_grad(loss)(state.weights)
        updates, moments = of_weights.update(grads, state.moments[0], state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return state._replace(weights=weights, moments=(moments, *state.moments[1:])), value

    def valid_step(state: Tuning, batch: Any, key: Key[Array, ""]) -> tuple[Tuning, Array]:
        examples = _examples(batch)

        def loss(lam: Array, xi: Array) -> tuple[Array, Array]:
            noisy = (
                perturb(key, specs, lam, xi, examples) if tune_scales else jnp.broadcast_to(lam, (examples, lam.size))
            )
            value = valid_loss(model(jax.lax.stop_gradient(state.weights), noisy), batch)
            return value - tau * entropy(xi), value

        (g_lam, g_xi), value = jax.grad(loss, argnums=(0, 1), has_aux=True)(state.lam, state.xi)
        u_lam, m_lam = of_lam.update(g_lam, state.moments[1], state.lam)
        u_xi, m_xi = of_xi.update(g_xi, state.moments[2], state.xi)
        xi: Any = optax.apply_updates(state.xi, u_xi) if tune_scales else state.xi
        lam: Any = optax.apply_updates(state.lam, u_lam)
        return Tuning(
            state.weights, lam, xi, (state.moments[0], m_lam, m_xi if tune_scales else state.moments[2])
        ), value  # type: ignore[arg-type]

    def cycle(state: Tuning, train: Any, valid: Any, key: Key[Array, ""]) -> Any:
        def steps(step: Any, state: Tuning, batches: Any, key: Any) -> Any:
            keys = jax.random.split(key, jax.tree.leaves(batches)[0].shape[0])
            return jax.lax.scan(lambda s, x: step(s, *x), state, (batches, keys))

        first_key, second_key = jax.random.split(key)
        state, trained = steps(train_step, state, train, first_key)
        state, validated = steps(valid_step, state, valid, second_key)
        return state, (trained, validated, constrain(specs, state.lam))

    return Tuner(
        init,
        train_step,
        valid_step,
        cycle,
        lambda state: hyper.apply(state.weights, state.lam - origin),
        lambda state: named_values(state.lam),
    )


def _examples(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


# ------------------------------------------------------------------------------------- regularisers, a strength an example


def dropout(key: Key[Array, ""], x: Float[Array, "b *d"], rate: Float[Array, "b"]) -> Float[Array, "b *d"]:
    """Dropout with a rate for each example, in [0, 1); what is kept is divided by 1 - rate."""
    keep = 1 - jnp.reshape(rate, (-1, *(1,) * (x.ndim - 1)))
    return jnp.where(jax.random.uniform(key, x.shape) < keep, x / keep, 0)


def cutout(
    key: Key[Array, ""], images: Float[Array, "b y x c"], length: Float[Array, "b"], holes: Any = 1, *, most: int = 4
) -> Float[Array, "b y x c"]:
    """Zeroes squares at random places, clipped at the borders (DeVries and Taylor, 2017).

    Args:
      length: the squares' side of each image, in pixels.
      holes: how many, of each image or of all; `most` bounds it and is static.
    """
    b, height, width, _ = images.shape
    at_y = jax.random.randint(key, (b, most, 1), 0, height)
    at_x = jax.random.randint(jax.random.fold_in(key, 1), (b, most, 1), 0, width)
    length = jnp.floor(jnp.reshape(length, (-1, 1, 1)))
    inside = lambda at, n: (jnp.arange(n) >= at - length // 2) & (jnp.arange(n) < at - length // 2 + length)
    counted = jnp.arange(most) < jnp.broadcast_to(jnp.asarray(holes), (b,))[:, None]
    hit = (inside(at_y, height)[..., :, None] & inside(at_x, width)[..., None, :] & counted[..., None, None]).any(1)
    return jnp.where(hit[..., None], 0, images)
