"""Errors over the tensor names of a file: what is missing, left over or misshapen, with near names beside."""

import difflib
from collections.abc import Sequence
from typing import Self


class TensorNamesError(ValueError):
    """A folder of tensors that cannot be read or written as asked; the message names the cause and the remedy.

    `missing`, `left_over` and `misshapen` hold tensor names where the fault is one of names or shapes.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        left_over: Sequence[str] = (),
        misshapen: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.left_over, self.misshapen = tuple(missing), tuple(left_over), tuple(misshapen)

    @classmethod
    def of(cls, title: str, missing: Sequence[str], left_over: Sequence[str], misshapen: Sequence[str]) -> Self:
        """With the three lists below `title`; `misshapen` lines are "name: what is wrong"."""
        return cls(
            title
            + listed("missing", [name + near_name(name, left_over) for name in missing])
            + listed("left over", [name + near_name(name, missing) for name in left_over])
            + listed("wrong", misshapen),
            missing=missing,
            left_over=left_over,
            misshapen=[line.partition(":")[0] for line in misshapen],
        )


def near_name(name: str, names: Sequence[str]) -> str:
    """' (near: ...)' where a similar name exists, else nothing."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f" (near: {found[0]})" if found else ""


def listed(title: str, lines: Sequence[str], limit: int = 12) -> str:
    """'title (n):' and the lines below each other, cut after `limit`."""
    if not lines:
        return ""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return f"\n{title} ({len(lines)}):" + "".join(f"\n  {line}" for line in [*lines[:limit], *more])
