"""Bottleneck adapters: small networks inside a frozen transformer's blocks.

- Houlsby: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., ICML 2019, arXiv:1902.00751): after attention
  and after the feed-forward network of every block.
- Pfeiffer: AdapterFusion / MAD-X (Pfeiffer et al., 2020, arXiv:2005.00247): after the feed-forward network only, around
  the block's last norm.
- Parallel and scaled parallel: He et al., ICLR 2022 (see `unified`): beside the feed-forward network, reading its input.

All are designs of `unified.DESIGNS`; the factories here fix the papers' defaults. None merges: there is a ReLU inside.
"""

from typing import Any

from jaxpeft import trees
from jaxpeft.adapt.unified import sublayer
from jaxpeft.method import Method, register

__all__ = ["houlsby", "parallel", "pfeiffer", "scaled_parallel"]


@register(
    family="adapt", paper="Houlsby et al., ICML 2019", mechanism="hooks", mergeable=False, exact_start=False, rate=2e-3
)
def houlsby(rank: int = 16, *, at: trees.Pattern | None = None, dropout: float = 0.0, name: str = "houlsby") -> Method:
    """Sequential adapters after attention and after the feed-forward network; arguments as in `unified.sublayer`."""
    return sublayer("houlsby", rank=rank, at=at, dropout=dropout, name=name)


@register(
    family="adapt", paper="Pfeiffer et al., EACL 2021", mechanism="hooks", mergeable=False, exact_start=False, rate=2e-3
)
def pfeiffer(
    rank: int = 16, *, at: trees.Pattern | None = None, dropout: float = 0.0, name: str = "pfeiffer"
) -> Method:
    """One sequential adapter a block, around its last norm (post-norm blocks); arguments as in `unified.sublayer`."""
    return sublayer("pfeiffer", rank=rank, at=at, dropout=dropout, name=name)


@register(
    family="adapt", paper="He et al., ICLR 2022", mechanism="hooks", mergeable=False, exact_start=False, rate=2e-3
)
def parallel(
    rank: int = 16, *, at: trees.Pattern | None = None, dropout: float = 0.0, name: str = "parallel"
) -> Method:
    """Parallel adapters beside the feed-forward network; arguments as in `unified.sublayer`."""
    return sublayer("parallel_adapter", rank=rank, at=at, dropout=dropout, name=name)


@register(family="adapt", paper="He et al., ICLR 2022", mechanism="hooks", mergeable=False, exact_start=True, rate=2e-3)
def scaled_parallel(
    rank: int = 16,
    scale: Any = 4.0,
    *,
    at: trees.Pattern | None = None,
    dropout: float = 0.0,
    name: str = "scaled_parallel",
) -> Method:
    """Scaled parallel adapters beside the feed-forward network, starting at zero; arguments as in `unified.sublayer`.

    `scale` is s, which the paper tunes on validation data (4 for generation, 2 for classification); None learns it.
    """
    return sublayer("scaled_parallel_adapter", rank=rank, at=at, scale=scale, dropout=dropout, name=name)
