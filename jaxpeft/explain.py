"""What an adaptation does to a model, site by site: which product was chosen, what it computes and moves.

    print(explain(adapted, params, delta, *inputs))

Shapes suffice: nothing is computed.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import PyTree

from jaxpeft import trees
from jaxpeft.method import Adapted, Delta, Mode, Params
from jaxpeft.weights import products
from jaxpeft.weights.factored import Factor, Factored
from jaxpeft.weights.watched import Use

__all__ = ["Explanation", "Site", "explain"]


@dataclass(frozen=True)
class Site:
    """One adapted place.

    Attributes:
      path: of the weight, or of the hooked module's part of the delta.
      kind: "low rank", "low rank with gains" (DoRA), "scaled" (IA3), ... for weights; "module" for what hooks and readers
        add.
      shape: of the weight (of one layer where layers are scanned), or how many numbers are added.
      product: "two products", "kernel", "merged"; "" where there is nothing to choose.
      uses: how often it is multiplied in one call, scanned layers counted each.
      operations: of these products, multiplications and additions counted separately.
      bytes: inputs, weights and results of these products, each once.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    product: str
    uses: int
    operations: int
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """All sites of one call, and the call's operations with and without the adaptation; prints as a table."""

    sites: tuple[Site, ...]
    operations: float
    base_operations: float

    def __str__(self) -> str:
        head = ("site", "kind", "shape", "product", "uses", "MFLOP", "MiB")
        rows = [
            (
                s.path,
                s.kind,
                "x".join(map(str, s.shape)),
                s.product or "-",
                str(s.uses) if s.uses else "-",
                f"{s.operations / 1e6:.2f}" if s.uses else "-",
                f"{s.bytes / 2**20:.2f}" if s.uses else "-",
            )
            for s in self.sites
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        line = lambda row: "  ".join(
            c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        more = self.operations / self.base_operations - 1 if self.base_operations else 0.0
        total = (
            f"one call: {self.operations / 1e9:.3f} GFLOP, {more:+.1%} of the base's {self.base_operations / 1e9:.3f}"
        )
        return "\n".join([line(head), *map(line, rows), total])


def explain(
    adapted: Adapted, params: Params, delta: Delta, *inputs: Any, platform: str | None = None, **kwargs: Any
) -> Explanation:
    """Traces one call of the adapted model and tells what happens at every adapted site.

    Args:
      adapted: model and method.
      params, delta, inputs, kwargs: as `adapted.apply` takes them; `jax.ShapeDtypeStruct` in place of arrays will do. What
        is told of a method that serves several tasks is told of one, whatever `task` is: they cost the same.
      platform: "cpu", "tpu" or "cuda": where the program would run; here, if not given. Operations of the whole call
        are counted by XLA before it optimises; where layers are scanned it counts one, and so do the totals.

    Returns:
      An `Explanation`: print it, or read `sites`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft
      >>> adapted = jaxpeft.adapt(lambda p, x: x @ p["w"], jaxpeft.lora(rank=2, at="w"))
      >>> params, x = {"w": jnp.ones((64, 32))}, jnp.ones((4, 64))
      >>> delta = adapted.init(jax.random.key(0), params, x)
      >>> site, = jaxpeft.explain(adapted, params, delta, x).sites
      >>> site.path, site.product, site.operations
      ('w', 'two products', 17920)
    """
    platform = platform or jax.default_backend()
    kwargs.pop("task", None)
    uses: list[Site] = []

    def call(params: Params, delta: Delta, inputs: Sequence[Any]) -> PyTree:
        # A use is told while tracing: what is kept of it is plain numbers.
        mode = Mode(None, "allow", adapted.backend, lambda use: uses.append(_site_of(use, platform)))
        mode = mode if adapted.method.tasks is None else mode._replace(task=0)
        return adapted.method.wrap(adapted.base, delta, mode)(params, *inputs, **kwargs)

    operations = _operations(call, params, delta, inputs)
    base = _operations(lambda params, inputs: adapted.base(params, *inputs, **kwargs), params, inputs)
    paths = list(dict.fromkeys(u.path for u in uses))
    sites = [_together([u for u in uses if u.path == path]) for path in paths]
    return Explanation((*sites, *_modules(delta, set(paths))), operations, base)


def _operations(function: Any, *shapes: Any) -> float:
    found = jax.jit(function).lower(*shapes).cost_analysis()
    return float((found or {}).get("flops", 0.0))


def _site_of(use: Use, platform: str) -> Site:
    n = use.repeats
    choice = _choice(use, platform)
    each = _operations_of(use, choice)
    return Site(use.path, _kind(use.value), use.value.shape, choice, n, n * each, n * _bytes_of(use))


def _together(uses: Sequence[Site]) -> Site:
    """The uses of one weight as one site."""
    return dataclasses.replace(
        uses[0],
        product=" / ".join(dict.fromkeys(u.product for u in uses)),
        uses=sum(u.uses for u in uses),
        operations=sum(u.operations for u in uses),
        bytes=sum(u.bytes for u in uses),
    )


def _kind(value: Any) -> str:
    if not isinstance(value, Factored):
        return type(value).__name__.lower()
    gains = " with gains" if value.gain else ""
    if len(value.terms) == 1:
        return "scaled" if value.gain else "factored"
    return ("low rank" if len(value.terms[1].factors) == 3 else "sum of products") + gains


def _rows(use: Use) -> int:
    return math.prod(use.x.shape) // math.prod(use.x.shape[i] for i in use.contract[0])


def _choice(use: Use, platform: str) -> str:
    value = use.value
    if not isinstance(value, Factored) or len(value.terms) != 2 or len(value.terms[1].factors) != 3:
        return ""
    # The letters of a plain matrix product: any that the value does not use will do for the rows.
    inner = "".join(value.axes[i] for i in use.contract[1])
    outer = "".join(g for i, g in enumerate(value.axes) if i not in (*use.contract[1], *use.batch[1]))
    lead = "".join(c for c in "ABCDEFGH" if c not in inner + outer)[: len(use.x.shape) - len(use.contract[0])]
    if use.batch[0] or value.low_rank_of(lead + inner, lead + outer) is None:
        return "two products"
    k = math.prod(value.sizes()[c] for c in inner)
    n = math.prod(value.sizes()[c] for c in outer)
    r = value.terms[1].factors[2].value.shape[0]
    local = products.is_local(use.x)
    return products.chosen(_rows(use), k, n, r, value.backend, platform, local=local)


def _operations_of(use: Use, choice: str) -> int:
    """Each factor meets the input's rows; where the sum is formed, or the value is no factored one, the dense product."""
    m, value = _rows(use), use.value
    if not isinstance(value, Factored):
        return 2 * m * math.prod(value.shape)
    gains = m * sum(f.value.size for f in value.gain)
    if choice == "merged":
        rank = value.terms[1].factors[2].value.shape[0]
        return 2 * (m + rank) * math.prod(value.shape) + gains
    factors: list[Factor] = [f for t in value.terms for f in t.factors]
    return sum(2 * m * f.value.size for f in factors if len(f.axes) > 1) + gains


def _bytes_of(use: Use) -> int:
    m, size = _rows(use), jnp.dtype(use.x.dtype).itemsize
    inner = math.prod(use.x.shape[i] for i in use.contract[0])
    outer = math.prod(n for i, n in enumerate(use.value.shape) if i not in (*use.contract[1], *use.batch[1]))
    return m * (inner + outer) * size + trees.nbytes(use.value)


def _modules(delta: Delta, seen: set[str]) -> list[Site]:
    """The rest of the delta, which is no product with a weight: what hooks and readers add, module by module."""
    sizes: dict[str, int] = {}
    for path, x in trees.by_path(trees.unmark(delta)).items():
        if not any(f"/{s}/" in f"/{path}/" for s in seen):
            module = path.rpartition("/")[0] or path
            sizes[module] = sizes.get(module, 0) + math.prod(x.shape)
    return [Site(module, "module", (size,), "", 0, 0, 0) for module, size in sizes.items()]
