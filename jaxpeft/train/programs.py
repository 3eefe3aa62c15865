"""The compiled programs of a sweep, by number of runs: what fits, where arrays stand, what trains and scores them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxpeft.train.chunks import cache_chunk, chunk_size
from jaxpeft.train.loop import Compiled
from jaxpeft.train.population import Population, Run, Runs, side_by_side
from jaxpeft.train.sharding import put

AXIS = "run"


class SweepError(ValueError):
    """A sweep that cannot work, or a setting that cannot."""


class Programs:
    """Compiles for a number of runs when it is first asked for.

    Args:
      make: `(setting) -> Run`.
      params: the base.
      mesh: None, or one with an axis "run".

    Raises:
      SweepError: a mesh without that axis.
    """

    def __init__(self, make: Callable[[Any], Run], params: PyTree, mesh: Mesh | None):
        if mesh is not None and AXIS not in mesh.axis_names:
            raise SweepError(f"the mesh has axes {mesh.axis_names}; runs are divided over an axis named {AXIS!r}")
        self._make, self._mesh = make, mesh
        self._unit = 1 if mesh is None else mesh.shape[AXIS]
        self._params = jax.tree.map(self._base, params)
        self._held: dict[tuple[str, int, int], Compiled] = {}
        self._whole = self._chunk = 0

    # ------------------------------------------------------------------------------------------------------ what fits

    def fit(
        self,
        settings: PyTree,
        batch: Any,
        validation: Sequence[Any],
        score: Callable[[dict[str, Any]], float],
        chunk: int | None,
        limit: int | None,
    ) -> int:
        """Decides how many runs are computed at once; traces `init` and `evaluate` and tries `score` before it compiles."""
        runs = self._runs(0)
        shapes = jax.eval_shape(runs.init, settings, self._params)
        if validation:
            sums = jax.eval_shape(runs.evaluate, shapes, self._params, validation[0])
            if "weight" not in sums:
                raise SweepError(f"`Run.evaluate` gives {sorted(sums)}; it lacks 'weight', the number of rows")
            try:
                score({name: np.ones(x.shape[1:])[()] for name, x in sums.items() if name != "weight"})
            except KeyError as error:
                raise SweepError(f"`score` asks for {error}; `Run.evaluate` gives {sorted(sums)}") from error
        count = jax.tree.leaves(settings)[0].shape[0]
        units = -(-count // self._unit)
        limit = _device_bytes() if limit is None else limit
        if chunk is not None:
            units = min(units, -(-chunk // self._unit))
        elif limit is not None:
            units = chunk_size(units, limit, lambda n: self._bytes_of(count, n * self._unit, shapes, batch))
        elif jax.default_backend() == "cpu":
            units = cache_chunk(units)
        self._chunk = units * self._unit
        self._whole = self._slots(count, self._chunk)
        return self._chunk

    def _bytes_of(self, count: int, chunk: int, shapes: Population, batch: Any) -> int:
        size = self._slots(count, chunk)
        cut = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), shapes)
        step = self._compiled("step", size, chunk)
        step.program(self._placed(cut, P(AXIS)), self._params, self._placed(batch, P()))
        if not step.peak_bytes:
            raise SweepError("this backend does not tell a program's memory: set `chunk` instead")
        return step.peak_bytes

    def _slots(self, count: int, chunk: int) -> int:
        unit = chunk if count > chunk else self._unit
        return -(-count // unit) * unit

    def slots(self, count: int) -> int:
        """Runs of the program for `count`: all, or the smallest half, quarter, ... of them that holds `count`."""
        size = self._whole
        while (half := self._slots(-(-size // 2), self._chunk)) >= count and half < size:
            size = half
        return size

    # ------------------------------------------------------------------------------------------------- where arrays are

    def _placed(self, tree: PyTree, spec: P) -> PyTree:
        if self._mesh is None:
            return tree
        where = NamedSharding(self._mesh, spec)

        def place(x: Any) -> Any:
            shape = isinstance(x, jax.ShapeDtypeStruct)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) if shape else put(x, where)

        return jax.tree.map(place, tree)

    def _base(self, x: Any) -> Any:
        """A weight that is on the mesh already stays as it is divided."""
        there = isinstance(getattr(x, "sharding", None), NamedSharding) and x.sharding.mesh == self._mesh
        return x if there else self._placed(x, P())

    # ------------------------------------------------------------------------------------------------------ what they do

    def _runs(self, chunk: int) -> Runs:
        return side_by_side(self._make, chunk=chunk or None, axis=None if self._mesh is None else AXIS)

    def _compiled(self, name: str, size: int, chunk: int = 0) -> Compiled:
        key = name, size, min(chunk or self._chunk, size)
        if key not in self._held:
            options: dict[str, Any] = {"donate_argnums": 0} if name == "step" else {}
            if self._mesh is not None:
                options["out_shardings"] = NamedSharding(self._mesh, P(AXIS))
            self._held[key] = Compiled(getattr(self._runs(key[2]), name), **options)
        return self._held[key]

    def start(self, settings: PyTree, held: Population | None) -> Population:
        """The runs of these settings at step 0, or those `held` on the host, on the device."""
        if held is not None:
            return self._placed(held, P(AXIS))
        init = self._compiled("init", self._whole)
        return init(self._placed(settings, P(AXIS)), self._params)

    def train(
        self, population: Population, source: Iterable[Any], first: int, last: int, tell: Any
    ) -> tuple[Population, dict[str, np.ndarray]]:
        """Steps `first` to `last` on the next batches; with the metrics, (last - first, size) each.

        Raises:
          SweepError: the batches end before.
        """
        step = self._compiled("step", population.step.shape[0])
        seen: list[dict[str, Any]] = []
        for at, batch in zip(range(first, last), source):
            population, metrics = step(population, self._params, self._placed(batch, P()))
            seen.append(metrics)
            if tell is not None:
                tell(at + 1, {name: np.asarray(x) for name, x in metrics.items()})
        if first + len(seen) < last:
            raise SweepError(f"the batches end after {first + len(seen)} of {last} steps")
        return population, {name: np.stack([np.asarray(m[name]) for m in seen]) for name in seen[0]}

    def evaluate(self, population: Population, validation: Sequence[Any]) -> dict[str, np.ndarray]:
        """What `Run.evaluate` sums, over all batches; nothing where there are none."""
        evaluation = self._compiled("evaluate", population.step.shape[0])
        total: dict[str, np.ndarray] = {}
        for batch in validation:
            sums = evaluation(population, self._params, self._placed(batch, P()))
            total = {name: np.asarray(x, np.float64) + total.get(name, 0.0) for name, x in sums.items()}
        return total

    # ---------------------------------------------------------------------------------------------------- what they cost

    @property
    def compiled_steps(self) -> int:
        return sum(c.count for (name, _, _), c in self._held.items() if name == "step")

    @property
    def compile_seconds(self) -> float:
        return sum(c.seconds for c in self._held.values())

    @property
    def peak_bytes(self) -> int:
        return self._compiled("step", self._whole).peak_bytes


def is_key(x: Any) -> bool:
    """Whether `x` holds typed keys, which are no numpy arrays."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_host(tree: PyTree) -> PyTree:
    """Numpy arrays; typed keys stay as they are."""
    return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), tree)


def _device_bytes() -> int | None:
    """What a device says it may hold; None where it does not say, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
