"""A model's computational graph, read from its jaxpr: for networks that take an architecture as their input.

    graph = model_graph(model.apply, spec, x)         # any JAX function of parameters and inputs
    graph.op (N,)  graph.shape (N, 4)  graph.distance (N, N)  graph.slots: which parameter each node holds

Nodes are what a network is drawn with, not its equations. Of the equations, in their order:

- one that reads a parameter is a node that holds it: a product with it is "linear" ("conv", "depthwise"), rows of it looked
  up are an "embedding", the factor behind a division by a deviation is a "norm" (with the shift behind that), and so on;
- a product of two activations, and whatever else brings two nodes together ("sum", "gate", "concat", "select", "index"), is
  a node;
- elementwise operations and reductions over one node gather and become one node for all of them, by what is among them:
  "norm", "softmax", "activation", "rotary", "pool", "mean"; scaling, casting and reshaping leave no trace;
- jit, remat, custom derivatives, cond, while and scan are entered. A scan over parameters (stacked layers) is unrolled, one
  slice a layer: its layers need weights, places and distances of their own, and the graph is then that of the same model
  written as a Python loop. A scan over anything else is a graph of one step, since its steps share their weights.

Numbering is topological (edges lead to higher numbers) and node 0 is the input, all inputs together. A parameter that is
read twice (a tied table) has two nodes, of which the first owns it; one that is never read has a node without edges.

The vocabulary is that of DeepNets-1M (Knyazev et al., "Parameter prediction for unseen deep architectures", NeurIPS 2021) as
GHN-3 and LoGAH extend it, except that norms' kinds and pools are fewer, and that activations are nodes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.tree_util as jtu
import numpy as np
from jaxtyping import Bool, Int, PyTree

from jaxpeft import trees
from jaxpeft.hyper.hypernetwork import TargetError, as_spec
from jaxpeft.hyper.read_graph import OPS, Slot, draw

__all__ = ["OPS", "Graph", "Slot", "model_graph", "pad_graph"]


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Graph:
    """A directed acyclic graph of N nodes, some of them padding; numpy arrays, which may be traced or stacked.

    Attributes:
      op: positions in `OPS`; 0 in padding.
      shape: (c_out, c_in, k_h, k_w) of the tensor that a node holds, zeros where it holds none.
      parameter: position in `slots` of that tensor (a norm's scale), -1 where there is none.
      distance: edges on the shortest path from row to column up to the cut-off, 1 on an edge, 0 where there is none.
      mask: which nodes are no padding.
      slots: every floating point parameter (slice), static.
    """

    op: Int[np.ndarray, "N"]
    shape: Int[np.ndarray, "N 4"]
    parameter: Int[np.ndarray, "N"]
    distance: Int[np.ndarray, "N N"]
    mask: Bool[np.ndarray, "N"]
    slots: tuple[Slot, ...] = dataclasses.field(metadata={"static": True})

    @property
    def adjacency(self) -> Bool[np.ndarray, "N N"]:
        """The edges alone."""
        return self.distance == 1

    def arrays(self) -> "Graph":
        """Without slots: graphs of one N are then trees of one structure, for one compiled program or `trees.stack`."""
        return dataclasses.replace(self, slots=())


def model_graph(
    apply_fn: Callable[..., Any],
    params_spec: PyTree,
    *inputs: Any,
    cutoff: int = 250,
    nodes: int | None = None,
    unknown: Literal["refuse", "other"] = "refuse",
) -> Graph:
    """The graph of `apply_fn(params, *inputs)`.

    Args:
      apply_fn: traced once on shapes; nothing is computed.
      params_spec: parameters, or `jax.ShapeDtypeStruct`s of them.
      inputs: arrays or shapes; a pytree each. Their sizes leave no trace, so small ones will do.
      cutoff: longest distance that is kept.
      nodes: N, filled with padding; None: as many as there are.
      unknown: what becomes of an operation outside the vocabulary: "refuse", or "other", a node of that type.

    Raises:
      TargetError: an operation outside the vocabulary; a specification without floating point leaves; more nodes than N.
      ValueError: a cut-off under 1, another `unknown`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> spec = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
      >>> graph = model_graph(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]), spec, jnp.ones((2, 4)))
      >>> [OPS[i] for i in graph.op]
      ['input', 'linear', 'bias', 'activation']
    """
    if cutoff < 1 or unknown not in ("refuse", "other"):
        raise ValueError(f"cutoff {cutoff}, unknown {unknown!r}: expected at least 1, and 'refuse' or 'other'")
    spec = as_spec(params_spec)
    flat = trees.by_path(spec)
    if not any(trees.is_learned(p, x) for p, x in flat.items()):
        raise TargetError("no leaf of the specification is floating point: there is nothing that a node could hold")
    drawn = draw(apply_fn, spec, inputs, unknown)
    ints = lambda x: np.asarray(x, np.int32)
    shape = [drawn.slots[i].sizes if i >= 0 else (0, 0, 0, 0) for i in drawn.owned]
    graph = Graph(
        ints(drawn.ops), ints(shape), ints(drawn.owned), _distances(len(drawn.ops), drawn.edges, cutoff),
        np.ones(len(drawn.ops), bool), drawn.slots,
    )  # fmt: skip
    return graph if nodes is None else pad_graph(graph, nodes)


def _distances(n: int, edges: Int[np.ndarray, "E 2"], cutoff: int) -> Int[np.ndarray, "N N"]:
    """Shortest paths, column by column: numbers are topological, so that what leads to a node is known before it is."""
    far = np.full((n, n), n)
    for i, j in edges[np.argsort(edges[:, 1], kind="stable")]:
        far[:, j] = np.minimum(far[:, j], far[:, i] + 1)
        far[i, j] = 1
    return np.where(far > min(cutoff, n - 1), 0, far).astype(np.int32)


def pad_graph(graph: Graph, nodes: int) -> Graph:
    """`graph` with padding up to `nodes`.

    Raises:
      TargetError: it has more.
    """
    more = nodes - len(graph.op)
    if more < 0:
        raise TargetError(f"a graph of {len(graph.op)} nodes does not fit {nodes}: raise the number")
    grow = lambda x, fill=0: np.pad(x, [(0, more)] * x.ndim, constant_values=fill)
    shape = np.pad(graph.shape, ((0, more), (0, 0)))
    return Graph(grow(graph.op), shape, grow(graph.parameter, -1), grow(graph.distance), grow(graph.mask), graph.slots)
