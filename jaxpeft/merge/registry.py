"""The merges that there are: what a command line and the common tests enumerate."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpeft import trees

__all__ = ["MERGES", "Merge", "merge", "register_merge"]


class Merge(NamedTuple):
    """What the library knows of a merge.

    Attributes:
      function: `(base, models, *, ...) -> params`.
      paper: authors, venue, year.
      needs_base: whether it is refused without theta0.
      needs_key: whether it draws random numbers, from `key`.
      needs: names of other arguments that have no default (scores, Fisher information).
      hyper: the range in which each numeric hyperparameter is searched. They may be traced: `vmap` over one gives the
        curve.
      symmetric: whether the order of the models is of no account.
      summary: one line.
    """

    function: Callable[..., Any]
    paper: str
    needs_base: bool
    needs_key: bool
    needs: tuple[str, ...]
    hyper: Mapping[str, tuple[float, float]]
    symmetric: bool
    summary: str


MERGES: dict[str, Merge] = {}


def register_merge(
    *,
    paper: str,
    needs_base: bool,
    needs_key: bool = False,
    needs: tuple[str, ...] = (),
    hyper: Mapping[str, tuple[float, float]] | None = None,
    symmetric: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts a merge into the registry under its own name; its summary is the first line of its docstring."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        summary = (function.__doc__ or "").strip().splitlines()[0]
        MERGES[function.__name__] = Merge(
            function, paper, needs_base, needs_key, needs, hyper or {}, symmetric, summary
        )
        return function

    return enter


def merge(name: str) -> Merge:
    """The registry's entry for `name`.

    Raises:
      ValueError: an unknown name; what there is, is listed.
    """
    if name not in MERGES:
        raise ValueError(f"unknown merge {name!r}{trees.near(name, MERGES)}; there are: {', '.join(sorted(MERGES))}")
    return MERGES[name]
