"""A sum of products of small arrays that acts as one weight: the value behind LoRA, DoRA, IA3, Kronecker and mixtures.

The arrays' axes carry letters, as in einsum. With w "io", a "ir", b "ro" and a scalar s,

    value[i, o] = gain * (w[i, o] + sum_r s a[i, r] b[r, o])

A letter that no axis of the value has (r) is summed. An axis of the value is a group of letters, so that merging axes
(`reshape`) and reordering them (`transpose`) only renames; (i1 i2)(o1 o2) is a Kronecker product. A factor without a
letter is constant along it. Products contract the input with one factor at a time and never form the sum: x[n, i]
meets a before b, whatever side of the product the weight is on, however its axes are split, batched or scanned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.kernels.low_rank_matmul import low_rank_matmul
from jaxpeft.weights import products
from jaxpeft.weights.array_like import ArrayLike, Dims

STATIC: dict[str, Any] = {"static": True}


@jtu.register_dataclass
@dataclass(frozen=True)
class Factor:
    """An array and one letter for each of its axes."""

    value: Array
    axes: str = field(metadata=STATIC)

    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.value.shape))


@jtu.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Dropout on the input of one term: `key` has shape () or, in stacked layers, that of `axes`; `rate` may be traced."""

    key: Key[Array, "..."]
    axes: str = field(metadata=STATIC)
    rate: Float[Array, ""]

    def __call__(self, x: Array) -> Array:
        keep = jax.random.bernoulli(self.key, 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / jnp.asarray(1.0 - self.rate, x.dtype), jnp.zeros((), x.dtype))


@jtu.register_dataclass
@dataclass(frozen=True)
class Term:
    """A product of factors."""

    factors: tuple[Factor, ...]
    dropout: Dropout | None = None


@jtu.register_dataclass
@dataclass(frozen=True)
class Factored(ArrayLike):
    """`gain * sum(terms)`; see the module. The first factor of the first term is the frozen weight and sets the dtype.

    Attributes:
      terms: what is summed.
      gain: factors common to all terms, with letters of the value only.
      axes: for each axis of the value the letters it is made of, slowest first; "" is an axis of size one.
      backend: how a low-rank sum is multiplied; see `products`.
    """

    terms: tuple[Term, ...]
    gain: tuple[Factor, ...]
    axes: tuple[str, ...] = field(metadata=STATIC)
    backend: products.Backend = field(default="auto", metadata=STATIC)

    # ------------------------------------------------------------------------------------------------- as an array

    def _factors(self) -> list[Factor]:
        return [f for t in self.terms for f in t.factors] + list(self.gain)

    def sizes(self) -> dict[str, int]:
        return {c: n for f in self._factors() for c, n in f.sizes().items()}

    @property
    def shape(self) -> Dims:
        sizes = self.sizes()
        return tuple(math.prod(sizes[c] for c in group) for group in self.axes)

    @property
    def dtype(self) -> Any:
        return self.terms[0].factors[0].value.dtype

    def dense(self) -> Array:
        letters, sizes = "".join(self.axes), self.sizes()
        wide = trees.wide_dtype(self.dtype)  # sums of bfloat16 products are rounded once, at the end
        total = 0.0
        for term in self.terms:
            total = total + _einsum(
                [Factor(f.value.astype(wide), f.axes) for f in term.factors], "".join(c for c in letters), sizes
            )
        for f in self.gain:
            total = total * _spread(f, letters).astype(wide)
        full = jnp.broadcast_to(total, tuple(sizes[c] for c in letters))
        return full.reshape(self.shape).astype(self.dtype)

    # --------------------------------------------------------------------------------------------------- structure

    def _map(self, function: Callable[[Factor], Factor]) -> "Factored":
        terms = tuple(dataclasses.replace(t, factors=tuple(map(function, t.factors))) for t in self.terms)
        return dataclasses.replace(self, terms=terms, gain=tuple(map(function, self.gain)))

    def each(self, function: Callable[[Array], Array]) -> "Factored":
        return self._map(lambda f: Factor(function(f.value), f.axes))

    def astype(self, dtype: Any) -> Any:
        if not jnp.issubdtype(dtype, jnp.inexact):
            return NotImplemented
        return self.each(lambda x: x.astype(dtype))

    def transpose(self, order: Dims) -> "Factored":
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in order))

    def reshape(self, shape: Dims) -> Any:
        """Merges axes by joining their letters; splits a merged axis between letters, or a letter itself."""
        value, letters = self, list("".join(self.axes))
        axes = []
        for size in shape:
            group, sizes = "", value.sizes()
            while math.prod(sizes[c] for c in group) < size:
                if not letters:
                    return NotImplemented
                c = letters.pop(0)
                have = math.prod(sizes[k] for k in group)
                if have * sizes[c] > size:  # the boundary falls inside this letter: split it
                    if size % have or sizes[c] % (size // have):
                        return NotImplemented
                    outer = size // have
                    new = _fresh(value, 2)
                    value = value._split(c, new, outer)
                    group += new[0]
                    letters.insert(0, new[1])
                    sizes = value.sizes()
                else:
                    group += c
            axes.append(group)
        if any(value.sizes()[c] != 1 for c in letters):
            return NotImplemented
        return dataclasses.replace(value, axes=tuple(axes))

    def _split(self, letter: str, new: str, outer: int) -> "Factored":
        def one(f: Factor) -> Factor:
            if letter not in f.axes:
                return f
            at, shape = f.axes.index(letter), f.value.shape
            return Factor(
                f.value.reshape(*shape[:at], outer, shape[at] // outer, *shape[at + 1 :]), f.axes.replace(letter, new)
            )

        return dataclasses.replace(self._map(one), axes=tuple(g.replace(letter, new) for g in self.axes))

    def along(self, axis: int, cut: Callable[[Array, int], Array]) -> Any:
        group = self.axes[axis]
        if len(group) != 1 or any(group in t.dropout.axes for t in self.terms if t.dropout):
            return NotImplemented
        return self._map(lambda f: Factor(cut(f.value, f.axes.index(group)), f.axes) if group in f.axes else f)

    def times(self, y: Array) -> Any:
        letters = ""
        if y.ndim:
            shape = self.shape
            for axis, group in enumerate(self.axes):
                if y.shape[axis] == 1:
                    continue
                if y.shape[axis] != shape[axis] or len(group) != 1:
                    return NotImplemented
                letters += group
            y = y.reshape([n for n in y.shape if n != 1] if len(letters) == sum(n != 1 for n in y.shape) else y.shape)
            if y.ndim != len(letters):
                return NotImplemented
        return dataclasses.replace(self, gain=(*self.gain, Factor(y.astype(self.dtype), letters)))

    def scanned(self) -> Any:
        letter, *rest = self.axes
        if len(letter) != 1:
            return NotImplemented
        flat, structure = jtu.tree_flatten(self, is_leaf=lambda x: isinstance(x, Factor | Dropout))
        parts, makers = [], []
        for part in flat:
            name = "value" if isinstance(part, Factor) else "key"
            if letter in part.axes:
                parts.append(jnp.moveaxis(getattr(part, name), part.axes.index(letter), 0))
                makers.append((part, name, len(parts) - 1))
            else:
                makers.append((part, name, None))

        def one_step(slices: Sequence[Array]) -> "Factored":
            made = [
                p if i is None else dataclasses.replace(p, **{name: slices[i]}, axes=p.axes.replace(letter, ""))
                for p, name, i in makers
            ]
            return dataclasses.replace(jtu.tree_unflatten(structure, made), axes=tuple(rest))

        return parts, one_step

    # ---------------------------------------------------------------------------------------------------- products

    def dot(self, x: Array, contract: tuple[Dims, Dims], batch: tuple[Dims, Dims], **options: Any) -> Any:
        sizes = self.sizes()
        groups: dict[int, str] = {i: self.axes[j] for i, j in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]))}
        free = iter(_fresh(self, x.ndim))
        own = [groups[i] if i in groups else next(free) for i in range(x.ndim)]
        shape = [n for i, size in enumerate(x.shape) for n in ([sizes[c] for c in own[i]] if i in groups else [size])]
        # An elementwise gain, along summed and kept axes at once, belongs neither to the input nor to the result.
        summed = {c for j in contract[1] for c in self.axes[j]}
        if any(summed & set(f.axes) and set(f.axes) - set("".join(own)) for f in self.gain):
            return NotImplemented
        x_free = [own[i] for i in range(x.ndim) if i not in groups]
        w_free = [self.axes[j] for j in range(len(self.axes)) if j not in (*contract[1], *batch[1])]
        out = [*(groups[i] for i in batch[0]), *x_free, *w_free]
        y = self._product(Factor(x.reshape(shape), "".join(own)), "".join(out), options)
        known = sizes | dict(zip("".join(own), shape))
        return y.reshape([math.prod(known[c] for c in group) for group in out])

    def _product(self, x: Factor, out: str, options: dict[str, Any]) -> Array:
        """`einsum(x, self -> out)`, one factor at a time; the sum over terms is over results."""
        sizes = self.sizes() | x.sizes()
        summed = set(x.axes) - set(out)
        before = [f for f in self.gain if summed & set(f.axes)]  # a gain along a contracted axis belongs to the input
        after = [f for f in self.gain if not summed & set(f.axes)]
        for f in before:
            x = Factor(x.value * _spread(f, x.axes).astype(x.value.dtype), x.axes)
        kind = options.get("preferred_element_type") or jnp.result_type(x.value.dtype, self.dtype)

        def each_term(value: "Factored", x: Factor) -> Array:
            total: Any = None
            for term in value.terms:
                start = Factor(term.dropout(x.value), x.axes) if term.dropout else x
                y = _einsum([start, *term.factors], out, sizes, first=True, **options).astype(kind)
                total = y if total is None else total + y
            return jnp.broadcast_to(total, tuple(sizes[c] for c in out))

        inner = self.low_rank_of(x.axes, out) if kind == x.value.dtype else None
        if inner is None or self.backend == "xla":
            total = each_term(self, x)
        else:
            total = _low_rank_product(self, x, inner, each_term, options)
        for f in after:
            total = total * _spread(f, out).astype(total.dtype)
        return jnp.broadcast_to(total, tuple(sizes[c] for c in out))

    def low_rank_of(self, x: str, out: str) -> str | None:
        """The contracted letters, where this is `w + a s b` and `einsum(x, self -> out)` one matrix product with it."""
        if len(self.terms) != 2 or len(self.terms[0].factors) != 1 or len(self.terms[1].factors) != 3:
            return None
        (w,), (a, s, b) = self.terms[0].factors, self.terms[1].factors
        inner = "".join(c for c in w.axes if c not in out)
        outer = w.axes[len(inner) :]
        lead = x[: len(x) - len(inner)]
        shared = [c for c in a.axes if c in b.axes]
        fits = (
            len(shared) == 1
            and not s.axes
            and inner
            and w.axes.startswith(inner)
            and x == lead + inner
            and out == lead + outer
            and a.axes == inner + shared[0]
            and b.axes == shared[0] + outer
            and not set(lead) & set(w.axes)
        )
        return inner if fits else None

    def take(self, axis: int, look_up: Callable[[Array, int], Array]) -> Any:
        letter = self.axes[axis]
        if len(letter) != 1 or not any(letter in f.axes for t in self.terms for f in t.factors):
            return NotImplemented
        rows: dict[str, int] = {}
        index = ""

        def one(f: Factor) -> Factor:
            nonlocal index
            if letter not in f.axes:
                return f
            found = look_up(f.value, f.axes.index(letter))
            index = index or _fresh(self, found.ndim - f.value.ndim + 1)
            rows.update(zip(index, found.shape))
            return Factor(found, index + f.axes.replace(letter, ""))

        taken = self._map(one)
        kept = tuple(g for i, g in enumerate(self.axes) if i != axis)
        taken = dataclasses.replace(
            taken, axes=(*index, *kept), terms=tuple(dataclasses.replace(t, dropout=None) for t in taken.terms)
        )
        return taken.dense()

    def conv(self, x: Array, params: dict[str, Any]) -> Any:
        """A term's factor with the window goes first; what is left maps channels, group by group."""
        numbers = params["dimension_numbers"]
        out_axis, in_axis, *window = numbers.rhs_spec
        if params["batch_group_count"] != 1 or any(len(self.axes[i]) > 1 for i in (out_axis, in_axis, *window)):
            return NotImplemented
        o, i, k = self.axes[out_axis], self.axes[in_axis], "".join(self.axes[d] for d in window)
        if not o or any(set(f.axes) - set(o) for f in self.gain):
            return NotImplemented
        total: Any = None
        for term in self.terms:
            y = _conv_term(term, x, params, o, i, k)
            if y is NotImplemented:
                return NotImplemented
            total = y if total is None else total + y
        channel = numbers.out_spec[1]
        for f in self.gain:
            total = (
                total * jnp.expand_dims(f.value, [d for d in range(total.ndim) if d != channel])
                if f.axes
                else total * f.value
            )
        return total.astype(params["preferred_element_type"] or jnp.result_type(x.dtype, self.dtype))

    def ragged_dot(self, x: Array, group_sizes: Array, params: dict[str, Any]) -> Any:
        g, i, o = self.axes
        if len(g + i + o) != 3 or self.gain:
            return NotImplemented
        total: Any = None
        for term in self.terms:
            h = term.dropout(x) if term.dropout else x
            todo, have = list(term.factors), i
            while todo:
                f = next((f for f in todo if f.axes.startswith(g + have) and len(f.axes) == 3), None)
                if f is None:
                    scale = next((f for f in todo if f.axes == ""), None)
                    if scale is None:
                        return NotImplemented
                    h, f = h * scale.value.astype(h.dtype), scale
                else:
                    h, have = (
                        lax.ragged_dot(h, f.value.astype(h.dtype), group_sizes, precision=params["precision"]),
                        f.axes[2],
                    )
                todo = [other for other in todo if other is not f]
            if have != o:
                return NotImplemented
            total = h if total is None else total + h
        return total.astype(params["preferred_element_type"] or total.dtype)


def _low_rank_product(
    value: Factored, x: Factor, inner: str, plain: Callable[[Factored, Factor], Array], options: dict[str, Any]
) -> Array:
    """The product of `x` with `value`, `low_rank_of` which is `inner`, as `products` chooses."""
    (w,), (a, s, b) = value.terms[0].factors, value.terms[1].factors
    k = math.prod(w.value.shape[: len(inner)])
    m, n, r = x.value.size // k, w.value.size // k, b.value.shape[0]
    lead, outer = x.value.shape[: x.value.ndim - len(inner)], w.value.shape[len(inner) :]
    choice = functools.partial(products.chosen, m, k, n, r, value.backend, local=products.is_local(x.value))
    drop = value.terms[1].dropout
    if value.backend == "merged" and drop is None:
        kind = x.value.dtype
        flat = [w.value.reshape(k, n), a.value.reshape(k, r), b.value.reshape(r, n) * s.value.astype(b.value.dtype)]
        y: Any = products.merged(options.get("precision"), x.value.reshape(m, k), *(f.astype(kind) for f in flat))
        return y.reshape(*lead, *outer)

    def kernel(value: Factored, x: Factor) -> Array:
        (w,), (a, s, b) = value.terms[0].factors, value.terms[1].factors
        drop = value.terms[1].dropout
        y = low_rank_matmul(
            x.value.reshape(m, k),
            w.value.reshape(k, n),
            a.value.reshape(k, r),
            b.value.reshape(r, n),
            s.value,
            key=None if drop is None else drop.key,
            dropout=0.0 if drop is None else drop.rate,
            precision=options.get("precision"),
        )
        return y.reshape(*lead, *outer)

    # Chosen here and not when the program is lowered: a choice inside the program has for residuals all that its branches
    # read, so that a scan would keep copies of the weights. Asked for by name, the kernel is there for any platform.
    platforms = ("tpu", "cuda") if value.backend == "pallas" else (jax.default_backend(),)
    return kernel(value, x) if any(choice(p) == "kernel" for p in platforms) else plain(value, x)


def _conv_term(term: Term, x: Array, params: dict[str, Any], o: str, i: str, k: str) -> Any:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *window = numbers.rhs_spec
    x = term.dropout(x) if term.dropout else x
    head = [f for f in term.factors if set(f.axes) & set(i + k)]
    tail = [f for f in term.factors if not set(f.axes) & set(i + k)]
    if len(head) != 1 or set(head[0].axes) & set(i + k) != set(i + k):
        return NotImplemented
    rest = [c for c in head[0].axes if c not in i + k]
    if len(rest) != 1:
        return NotImplemented
    r = rest[0]
    # The kernel in the order of the equation; with groups each of them needs its own copy of a shared factor.
    if len(k) != len(window) or not i:
        return NotImplemented
    place = {out_axis: r, in_axis: i, **dict(zip(window, k))}
    kernel = jnp.transpose(head[0].value, [head[0].axes.index(place[d]) for d in range(len(place))]).astype(x.dtype)
    shared = r != o and groups > 1
    if shared:
        kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    keep = {n: v for n, v in params.items() if n in _CONV_OPTIONS}
    y = lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **keep)
    channel = numbers.out_spec[1]
    if not tail:
        return y if r == o else NotImplemented
    y = jnp.moveaxis(y, channel, -1)
    if not shared:
        letters = "".join(_letters_apart(o + r + "".join(f.axes for f in tail), y.ndim - 1))
        y = _einsum([Factor(y, letters + r), *tail], letters + o, {}, first=True)
    else:
        size = next(f.sizes()[o] for f in tail if o in f.axes)
        n, g = _letters_apart(o + r + "".join(f.axes for f in tail), 2)
        cut = [
            Factor(
                f.value.reshape(
                    *f.value.shape[: f.axes.index(o)], groups, size // groups, *f.value.shape[f.axes.index(o) + 1 :]
                ),
                f.axes.replace(o, g + o),
            )
            if o in f.axes
            else f
            for f in tail
        ]
        flat = y.reshape(-1, groups, y.shape[-1] // groups)
        y = _einsum([Factor(flat, n + g + r), *cut], n + g + o, {}, first=True).reshape(*y.shape[:-1], size)
    return jnp.moveaxis(y, -1, channel)


_CONV_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "feature_group_count",
    "precision",
    "preferred_element_type",
)


# ------------------------------------------------------------------------------------------------------ small einsum


def _letters_apart(used: str, n: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "".join([c for c in alphabet if c not in used][:n])


def _fresh(value: Factored, n: int) -> str:
    """Letters that the value does not use."""
    return _letters_apart("".join(f.axes for f in value._factors()) + "".join(value.axes), n)


def _spread(f: Factor, letters: str) -> Array:
    """The factor with its axes in the order of `letters` and axes of size one where it lacks a letter."""
    order = [f.axes.index(c) for c in letters if c in f.axes]
    return jnp.expand_dims(jnp.transpose(f.value, order), [i for i, c in enumerate(letters) if c not in f.axes])


def _einsum(parts: Sequence[Factor], out: str, sizes: dict[str, int], *, first: bool = False, **options: Any) -> Array:
    """The product of `parts` summed over the letters not in `out`.

    With `first` the first part is an input that meets one factor at a time, the one that leaves the least first: the
    factors are never multiplied together unless they share a summed letter (a mask), which no other order could sum.
    Without it, factors meet in the order given. Letters of `out` that no part has are left of size one.
    """
    todo, current = list(parts[1:]), parts[0]
    known = dict(sizes) | {c: n for f in parts for c, n in f.sizes().items()}

    def wanted(rest: Sequence[Factor]) -> set[str]:
        return set(out) | {c for f in rest for c in f.axes}

    if first:
        current, todo = _join_masks(current, todo, out)
    while todo:

        def left(f: Factor) -> tuple[bool, int]:
            rest = [g for g in todo if g is not f]
            union = [c for c in dict.fromkeys(current.axes + f.axes) if c in wanted(rest)]
            return not (set(f.axes) & set(current.axes) or not f.axes), math.prod(known[c] for c in union)

        nearest = min(todo, key=left) if first else todo[0]
        todo = [f for f in todo if f is not nearest]
        keep = "".join(c for c in dict.fromkeys(current.axes + nearest.axes) if c in wanted(todo))
        if not todo:
            keep = "".join(c for c in out if c in current.axes + nearest.axes)
        current = Factor(_pair(current, nearest, keep, options if not todo else _inner(options)), keep)
    if set(current.axes) - set(out):
        current = Factor(
            current.value.sum([i for i, c in enumerate(current.axes) if c not in out]),
            "".join(c for c in current.axes if c in out),
        )
    return _spread(current, out)


def _join_masks(x: Factor, factors: list[Factor], out: str) -> tuple[Factor, list[Factor]]:
    """Brings together factors that share a letter which x has and the result lacks: they can only be summed together.

    One that has no letters but x's (a gate along the summed axis, of each example) is multiplied into x instead, unless
    that is the larger product: joined with the weight it would make a weight of each example.
    """
    known = {c: n for f in (x, *factors) for c, n in f.sizes().items()}
    size = lambda axes: math.prod(known[c] for c in axes)
    for c in set(x.axes) - set(out):
        sharing = [f for f in factors if c in f.axes]
        if len(sharing) < 2:
            continue
        factors = [f for f in factors if all(f is not g for g in sharing)]
        union = "".join(dict.fromkeys("".join(f.axes for f in sharing)))
        for f in [f for f in sharing if set(f.axes) <= set(x.axes) and size(x.axes) <= size(union)]:
            x = Factor(_pair(x, f, x.axes, {}), x.axes)
            sharing = [g for g in sharing if g is not f]
        if not sharing:
            continue
        joined = sharing[0]
        for f in sharing[1:]:
            keep = "".join(dict.fromkeys(joined.axes + f.axes))
            joined = Factor(_pair(joined, f, keep, {}), keep)
        factors = [*factors, joined]
    return x, factors


def _inner(options: dict[str, Any]) -> dict[str, Any]:
    return {"precision": options.get("precision")}


def _pair(a: Factor, b: Factor, out: str, options: dict[str, Any]) -> Array:
    y = b.value.astype(a.value.dtype)
    if not set(a.axes + b.axes) - set(out):  # nothing is summed: a broadcast product, cheaper than a dot of size one
        return _spread(a, out) * _spread(Factor(y, b.axes), out)
    return jnp.einsum(
        f"{a.axes},{b.axes}->{out}",
        a.value,
        y,
        precision=options.get("precision"),
        preferred_element_type=options.get("preferred_element_type"),
    )


# ------------------------------------------------------------------------------------------------- naming for the kinds


def names(n: int) -> str:
    """`n` letters for the axes of a weight; `r` and `q` are left for ranks."""
    return _letters_apart("rq", n)


def letters(w: Array, a: Array, b: Array) -> tuple[str, str, str]:
    """Letters for the (stacked, inner, outer) axes of `w`, told from the ranks and checked against the shapes.

    Raises:
      ValueError: `a` and `b` do not factor a weight of this shape.
    """
    stack = (a.ndim - 1) + (b.ndim - 1) - w.ndim
    inner = a.ndim - 1 - stack
    split = stack + inner
    fits = (
        stack >= 0
        and inner >= 1
        and a.shape[:-1] == w.shape[:split]
        and b.shape[:stack] == w.shape[:stack]
        and b.shape[stack + 1 :] == w.shape[split:]
        and a.shape[-1] == b.shape[stack]
    )
    if not fits:
        raise ValueError(f"factors of shapes {a.shape} and {b.shape} do not make a weight of shape {w.shape}")
    axes = names(w.ndim)
    return axes[:stack], axes[stack:split], axes[split:]
