"""The MAM adapter: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022 (section 4.6).

"Mix-and-match": a short prefix at every attention sub-layer, where little capacity goes far, and a large scaled parallel
adapter beside every feed-forward network, where capacity pays. As a chain of the two methods:

    mam = chain(prefix_tuning(l), scaled_parallel(r, s))

Defaults are the paper's for classification (GLUE): l = 16, r = 16, s = 2; for generation it takes l = 30, r = 512, s = 4.
"""

from typing import Any

from jaxpeft.adapt.adapters import scaled_parallel
from jaxpeft.adapt.prefix_tuning import prefix_tuning
from jaxpeft.method import Method, chain, register

__all__ = ["mam"]


@register(
    family="adapt", paper="He et al., ICLR 2022", mechanism="chain", mergeable=False, exact_start=False, rate=2e-3
)
def mam(
    length: int = 16, rank: int = 16, scale: Any = 2.0, *, mlp: int = 800, dropout: float = 0.0, name: str = "mam"
) -> Method:
    """The MAM adapter.

    Args:
      length: of the prefix, l.
      rank: the bottleneck of the adapters, r.
      scale: s; may be traced.
      mlp: width of the prefix's reparameterising network, 0 for none.
      dropout: inside the bottleneck.
      name: the chain's name.

    Raises:
      ValueError: as `prefix_tuning` and `scaled_parallel`.
    """
    return chain(prefix_tuning(length, mlp), scaled_parallel(rank, scale, dropout=dropout), name=name)
