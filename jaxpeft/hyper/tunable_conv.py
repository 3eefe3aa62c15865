"""Tunable convolutions with parametric multi-loss optimization (Maggioni, Tanay, Babiloni, McDonagh, Leonardis, CVPR 2023).

A model that a user steers while it runs. Each convolution or linear layer holds K kernels; a vector ω, one number for each
of p objectives, mixes them by one affine map a module, and weights the objectives in the loss by the same numbers:

    α = M ω + m                       "mlp", K = p e kernels; no activation, no softmax. "linear": α = ω, K = p
    W = Σ_j α_j k_j,  b = Σ_j α_j b_j
    L(ω) = Σ_i ω_i λ_i L_i(f(x; ω), y)

ω is drawn anew for each example in training, so that afterwards one network serves the whole trade-off. For one ω every
module is an ordinary layer again, at an ordinary layer's cost (`apply`).

Letters: p objectives, K kernels, e the expansion, b examples.

Reference code: mindspore-lab/mindediting @ f76f419 and its port sybahk/tunable-convolution-pytorch @ 58abe3e
(tunable_conv.py). Departures: there M and the kernels start so small that a plain network's layers begin near zero; here M
starts as the identity (each kernel an objective's own, as in "linear") and every kernel as the model's own initialisation
draws it. Examples with an ω each are not one grouped convolution but K convolutions of the whole batch, whose results are
mixed: the same function, and K times a plain layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.hyper.hypernetwork import Hypernetwork, TargetError, as_spec, bias_of, register_hypernetwork, stacked_paths
from jaxpeft.weights.factored import Factor, Factored, Term, names

__all__ = ["balanced", "multi_loss", "sample_omega", "tunable_conv"]

Mixing = Literal["mlp", "linear"]
Kind = Literal["simplex", "box", "vertices"]
KERNELS = "**/kernel"


@register_hypernetwork(paper="Maggioni et al., CVPR 2023")
def tunable_conv(
    init_fn: Callable[[Key[Array, ""]], PyTree],
    *,
    objectives: int = 2,
    expand: int = 1,
    mode: Mixing = "mlp",
    at: trees.Pattern = KERNELS,
    parameters: trees.Pattern | None = None,
    stacked: trees.Pattern | None = None,
) -> Hypernetwork:
    """Any model made tunable.

    Args:
      init_fn: `key -> params`, the model's own initialisation (`lambda key: model.init(key, x)`).
      objectives: p.
      expand: e, kernels an objective; over 1 is "mlp" alone.
      mode: "mlp" or "linear", see the module.
      at: pattern of the kernels. The bias of a kernel's module goes with it, under the same α.
      parameters: pattern of further leaves (scales of residual branches, say), whose K copies start equal.
      stacked: pattern of leaves whose first axis counts layers (of a scanned model): each layer has an α of its own.

    Returns:
      A hypernetwork: `apply(weights, omega)` takes ω (p,) and returns ordinary parameters; `per_example(apply_fn, hyper)`
      runs a batch with an ω (b, p) each. What is not tunable (norms, embeddings) is shared by all ω.

      weights: {"bank": {path: (K, *shape)}, "mix": {module: {"matrix": (K, p), "bias": (K,)}}, "shared": {path: array}},
      with a leading axis of layers in "mix" where they are stacked; "mix" is empty in mode "linear".

    Raises:
      PatternError: nothing matches a pattern.
      TargetError: a chosen leaf that is not floating point.
      ValueError: no objectives, an unknown mode, or `expand` over 1 in mode "linear"; in `apply` an ω of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> hyper = tunable_conv(lambda key: {"layer": {"kernel": jax.random.normal(key, (3, 3, 1, 8))}})
      >>> params = hyper.apply(hyper.init(jax.random.key(0)), jnp.array([0.7, 0.3]))
      >>> params["layer"]["kernel"].shape
      (3, 3, 1, 8)
    """
    if objectives < 1 or expand < 1:
        raise ValueError(f"{objectives} objectives of {expand} kernels: there is at least one of each")
    if mode not in ("mlp", "linear") or (mode == "linear" and expand > 1):
        raise ValueError(
            f"mode {mode!r} with expand {expand}: expected 'mlp', or 'linear' with one kernel an objective"
        )
    count = objectives * expand
    spec = jax.eval_shape(init_fn, jax.random.key(0))
    flat = trees.by_path(spec)
    kernels = trees.matches(at, flat, "parameter")
    biases = [b for k in kernels if (b := bias_of(k, flat)) is not None]
    equal = [] if parameters is None else trees.matches(parameters, flat, "parameter")
    layers = stacked_paths(spec, stacked)
    tunable = dict.fromkeys([*kernels, *biases, *equal])
    for path in tunable:
        if not trees.is_learned(path, flat[path]):
            raise TargetError(f"{path!r} is {flat[path].dtype}, which cannot be mixed: leave it out of the pattern")
    # One affine map a module; a free parameter is a module by itself.
    owner = {path: path if path in equal else _module(path) for path in tunable}
    depth = {owner[path]: (flat[path].shape[0],) if path in layers else () for path in tunable}

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, count)
        draws = trees.by_path(jax.vmap(init_fn)(keys))
        bank = {p: jnp.broadcast_to(draws[p][:1], draws[p].shape) if p in equal else draws[p] for p in tunable}
        # Each of an objective's e kernels starts with a share of 1 / e.
        start = jnp.repeat(jnp.eye(objectives), expand, 0) / expand
        mix = {
            m: {"matrix": jnp.broadcast_to(start, (*lead, *start.shape)), "bias": jnp.zeros((*lead, count))}
            for m, lead in depth.items()
        }
        shared = {p: x[0] for p, x in draws.items() if p not in tunable}
        return {"bank": bank, "mix": mix if mode == "mlp" else {}, "shared": shared}

    def coefficients(weights: PyTree, omega: Any) -> dict[str, Array]:
        omega = jnp.asarray(omega)
        if omega.shape != (objectives,):
            raise ValueError(
                f"omega of shape {omega.shape} for {objectives} objectives: `apply` takes one; a batch of them goes "
                "through vmap or `per_example`"
            )
        if mode == "linear":
            return {m: jnp.broadcast_to(omega, (*lead, count)) for m, lead in depth.items()}
        return {m: p["matrix"] @ omega + p["bias"] for m, p in weights["mix"].items()}

    def emit(weights: PyTree, omega: Any, factored: bool) -> PyTree:
        alphas = coefficients(weights, omega)

        def leaf(path: str) -> Any:
            bank, alpha = weights["bank"][path], alphas[owner[path]]
            wide = trees.wide_dtype(bank.dtype)
            if factored and path in kernels:
                return _sum(bank, alpha.astype(bank.dtype), path in layers)
            each = jnp.moveaxis(alpha, -1, 0).astype(wide)  # (K,) or (K, L)
            each = each.reshape(*each.shape, *(1,) * (bank.ndim - each.ndim))
            return (each * bank.astype(wide)).sum(0).astype(bank.dtype)

        made = {p: leaf(p) if p in tunable else weights["shared"][p] for p in flat}
        return jtu.tree_unflatten(jtu.tree_structure(spec), list(made.values()))

    config = {
        "objectives": objectives, "expand": expand, "mode": mode, "at": at, "parameters": parameters, "stacked": stacked,
    }  # fmt: skip
    return Hypernetwork(
        "tunable_conv",
        init,
        lambda weights, omega: emit(weights, omega, False),
        as_spec(spec),
        config,
        lambda weights, omega: emit(weights, omega, True),
    )


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _sum(bank: Array, alpha: Array, stacked: bool) -> Factored:
    """Σ_j α_j k_j whose products are those of the k_j; stacked layers have an α each."""
    letters = names(bank.ndim - 1)
    own = letters[0] if stacked else ""
    terms = tuple(Term((Factor(k, letters), Factor(alpha[..., j], own))) for j, k in enumerate(bank))
    return Factored(terms, (), tuple(letters))


# --------------------------------------------------------------------------------------------------------- objectives


def sample_omega(key: Key[Array, ""], examples: int, objectives: int, kind: Kind = "simplex") -> Float[Array, "b p"]:
    """ω for each example of a batch.

    Args:
      kind: "simplex": uniform where Σ ω = 1, for trade-offs (denoising against keeping detail). "box": uniform in [0, 1]^p,
        for strengths that do not depend on one another. "vertices": one objective each, at random.

    Raises:
      ValueError: an unknown kind.
    """
    if kind == "simplex":
        return jax.random.dirichlet(key, jnp.ones(objectives), (examples,))
    if kind == "box":
        return jax.random.uniform(key, (examples, objectives))
    if kind == "vertices":
        return jax.nn.one_hot(jax.random.randint(key, (examples,), 0, objectives), objectives)
    raise ValueError(f"kind {kind!r}: expected 'simplex', 'box' or 'vertices'")


def multi_loss(losses: Sequence[Callable[..., Float[Array, "b"]]], scales: Sequence[Any]) -> Callable[..., Array]:
    """`(omega (b, p), *args) -> (b,)`, Σ_i ω_i λ_i L_i(*args).

    Args:
      losses: p functions of the same arguments, each with a value for every example.
      scales: λ, which bring the objectives to one scale; see `balanced`.

    Raises:
      ValueError: as many scales as losses are needed; in the call, an ω for another number of objectives.
    """
    if len(losses) != len(scales) or not losses:
        raise ValueError(f"{len(losses)} losses and {len(scales)} scales: expected as many, at least one")

    def loss(omega: Float[Array, "b p"], *args: Any) -> Float[Array, "b"]:
        if jnp.shape(omega)[-1] != len(losses):
            raise ValueError(f"omega of shape {jnp.shape(omega)} for {len(losses)} objectives")
        return sum(omega[..., i] * scale * one(*args) for i, (one, scale) in enumerate(zip(losses, scales)))  # type: ignore[return-value]

    return loss


def balanced(losses: Sequence[Callable[..., Float[Array, "b"]]], *args: Any) -> Float[Array, "p"]:
    """λ with which all objectives have the first one's mean on these arguments (a batch before training)."""
    means = jnp.stack([one(*args).mean() for one in losses])
    return means[0] / jnp.maximum(means, jnp.finfo(means.dtype).tiny)
