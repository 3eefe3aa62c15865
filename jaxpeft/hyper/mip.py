"""Magnitude invariant parametrizations, MIP (Gonzalez Ortiz, Guttag, Dalca, ICLR 2024).

A hypernetwork of linear layers, zero biases and (leaky) ReLU is positively homogeneous: h(cγ) = c h(γ), so that the scale of
what it emits, and of its gradients, swings with its input. Two changes take that away:

    E(γ) = [cos(πγ/2), sin(πγ/2)]                          an input of one length, ‖E(γ)‖ = √D for γ in [0, 1]^D
    h_k  = LeakyReLU(h_{k-1} A_k + a_k),  h_0 = E(γ)
    θ_p  = θ⁰_p + h_K · G_p                                a change of weights θ⁰ that are learned along, one head G_p a tensor

Starts: A_k ~ N(0, 2 / n_k) with n_k its outputs (fan-out); G_p ~ N(0, 2 / N_p) with N_p the numbers in the tensor it emits,
not in all of them; a_k = 0; θ⁰ a base that is given, or kernels N(0, 2 / fan-in), biases 0 and norms' scales 1.

Letters: D input size, h width of the last hidden layer.

Reference code: JJGO/hyperlight @ a3e2108 (hyperlight/hypernet). Departures: there θ⁰ starts at 0 wherever a name is neither
weight nor bias, which would switch a norm off; its output matrix is one, here it is a tree with a head for each tensor,
of the same starts. With `residual=False` what takes θ⁰'s place is the output layer's ordinary bias, from zero.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.hyper.hypernetwork import Hypernetwork, as_spec, register_hypernetwork, split_target, stacked_paths

__all__ = ["mip", "mip_encode"]

Encoding = Literal["cos_sin", "complement", "none"]
Start = Literal["fan_out", "fan_in"]
SLOPE = 0.01  # of the leaky ReLU


def mip_encode(gamma: Float[Array, "*batch D"], encoding: Encoding = "cos_sin") -> Float[Array, "*batch E"]:
    """E(γ).

    Args:
      gamma: in [0, 1]; scale other inputs first. Outside, cosine and sine repeat, so that different inputs become equal.
      encoding: "cos_sin", all cosines before all sines, of Euclidean norm √D (E = 2 D); "complement", [γ, 1 - γ], of
        constant sum; "none", γ itself.

    Raises:
      ValueError: an unknown encoding.
    """
    gamma = jnp.asarray(gamma)
    if encoding == "cos_sin":
        angle = gamma * (jnp.pi / 2)
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    if encoding == "complement":
        return jnp.concatenate([gamma, 1 - gamma], -1)
    if encoding == "none":
        return gamma
    raise ValueError(f"encoding {encoding!r}: expected 'cos_sin', 'complement' or 'none'")


@register_hypernetwork(paper="Gonzalez Ortiz et al., ICLR 2024")
def mip(
    spec: PyTree,
    inputs: int | Mapping[str, int],
    *,
    hidden: tuple[int, ...] = (16, 128),
    encoding: Encoding = "cos_sin",
    residual: bool = True,
    start: Start = "fan_out",
    base: PyTree = None,
    stacked: trees.Pattern | None = None,
) -> Hypernetwork:
    """A hypernetwork for any model.

    Args:
      spec: the target's parameters, as `jax.eval_shape(model.init, ...)` gives them.
      inputs: D; or the sizes of several named inputs, which are joined in the alphabetical order of their names.
      hidden: widths of the hidden layers; () makes θ affine in E(γ).
      encoding: as in `mip_encode`.
      residual: whether θ⁰ starts as weights of their own. False: at zero, the bias of an ordinary output layer.
      start: "fan_out", or "fan_in" for the ablation: the heads then start at N(0, 2 / h).
      base: parameters that θ⁰ starts from, a trained model's or `model.init`'s own.
      stacked: pattern of leaves whose first axis counts layers (of a scanned model): starts are those of one layer.

    Returns:
      A hypernetwork whose `apply(weights, gamma)` takes gamma (*batch, D), or a mapping of such arrays, and returns
      parameters whose leaves have those leading axes. Sums are in float32 or wider, then cast to the target's dtypes.

      weights: {"trunk": {"0": {"kernel", "bias"}, ...}, "heads": a tree like the target with leaves (h, *shape), "base": a
      tree like the target}. To keep θ⁰ as it is, train the other two.

    Raises:
      TargetError: as `split_target`.
      PatternError: nothing matches `stacked`.
      ValueError: an input size or width under 1, an unknown encoding or start; in `apply`, inputs of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> spec = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
      >>> hyper = mip(spec, inputs=2)
      >>> params = hyper.apply(hyper.init(jax.random.key(0)), jnp.array([0.2, 1.0]))
      >>> params["kernel"].shape
      (4, 3)
    """
    sizes = {"": inputs} if isinstance(inputs, int) else dict(sorted(inputs.items()))
    if not sizes or min(sizes.values()) < 1 or min(hidden, default=1) < 1:
        raise ValueError(f"inputs {inputs}, hidden {hidden}: sizes are at least 1")
    if start not in ("fan_out", "fan_in"):
        raise ValueError(f"start {start!r}: expected 'fan_out' or 'fan_in'")
    emitted, others = split_target(spec, base)
    layers = stacked_paths(spec, stacked)
    widths = [mip_encode(jnp.zeros(sum(sizes.values())), encoding).shape[0], *hidden]

    def init(key: Key[Array, ""]) -> PyTree:
        trunk_key, head_key, base_key = jax.random.split(key, 3)
        gain = lambda rows, columns: (2 / (columns if start == "fan_out" else rows)) ** 0.5
        trunk = {
            str(i): {"kernel": gain(m, n) * jax.random.normal(k, (m, n)), "bias": jnp.zeros(n)}
            for i, (m, n, k) in enumerate(zip(widths, widths[1:], jax.random.split(trunk_key, max(1, len(hidden)))))
        }

        def one_head(path: str, x: Any, key: Any) -> Array:
            std = gain(widths[-1], max(1, _size(x.shape[path in layers :])))
            return std * jax.random.normal(key, (widths[-1], *x.shape))

        def one_base(path: str, x: Any, key: Any) -> Array:
            return _ordinary(path, x.shape, key, path in layers) if residual else jnp.zeros(x.shape)

        given = None if base is None else trees.partition(base, trees.is_learned)[0]
        own = _mapped(one_base, emitted, base_key) if given is None else jax.tree.map(_wide, given)
        return {"trunk": trunk, "heads": _mapped(one_head, emitted, head_key), "base": own}

    def apply(weights: PyTree, gamma: Any) -> PyTree:
        h = mip_encode(_joined(gamma, sizes), encoding)
        for i in range(len(hidden)):
            layer = weights["trunk"][str(i)]
            h = jax.nn.leaky_relu(h @ layer["kernel"] + layer["bias"], SLOPE)
        made = jax.tree.map(
            lambda x, own, head: (own + jnp.tensordot(h, head, axes=1)).astype(x.dtype),
            emitted, weights["base"], weights["heads"],
        )  # fmt: skip
        return _with_others(made, others, h.shape[:-1])

    config = {
        "inputs": inputs, "hidden": hidden, "encoding": encoding, "residual": residual, "start": start,
        "stacked": stacked,
    }  # fmt: skip
    return Hypernetwork("mip", init, apply, as_spec(spec), config)


def _joined(gamma: Any, sizes: Mapping[str, int]) -> Array:
    """The inputs as one array, in the alphabetical order of their names."""
    given = dict(gamma) if isinstance(gamma, Mapping) else {"": gamma}
    if set(given) != set(sizes):
        raise ValueError(f"inputs named {sorted(given)}, expected {sorted(sizes)}")
    parts = {name: jnp.asarray(given[name]) for name in sizes}
    for name, x in parts.items():
        if x.ndim < 1 or x.shape[-1] != sizes[name]:
            raise ValueError(f"an input {name!r} of shape {x.shape}: its last axis should have {sizes[name]}")
    return jnp.concatenate(list(parts.values()), -1)


def _with_others(made: PyTree, others: PyTree, batch: tuple[int, ...]) -> PyTree:
    """The emitted leaves, and those of the base that are not emitted, repeated for each of a batch of inputs."""
    return trees.combine(made, jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *jnp.shape(x))), others))


def _mapped(one: Any, tree: PyTree, key: Key[Array, ""]) -> PyTree:
    """`one(path, leaf, key)` of every leaf, each with a key of its own."""
    flat, structure = jtu.tree_flatten_with_path(tree)
    keys = jax.random.split(key, len(flat))
    return jtu.tree_unflatten(structure, [one(trees.path_string(p), x, k) for (p, x), k in zip(flat, keys)])


def _ordinary(path: str, shape: tuple[int, ...], key: Key[Array, ""], stacked: bool) -> Array:
    """An ordinary start of a tensor: biases 0, scales 1, other vectors 0, and what has more axes N(0, 2 / fan-in)."""
    inner, name = shape[stacked:], path.rpartition("/")[2]
    if len(inner) > 1 and name not in ("bias", "scale"):
        return (2 / max(1, _size(inner[:-1]))) ** 0.5 * jax.random.normal(key, shape)
    return jnp.full(shape, float(name == "scale"))


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _wide(x: Any) -> Array:
    return jnp.asarray(x).astype(trees.wide_dtype(jnp.result_type(x)))
