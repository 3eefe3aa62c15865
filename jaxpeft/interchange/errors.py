"""The one error of this package."""

from collections.abc import Sequence


class InterchangeError(ValueError):
    """An adapter that cannot be written or read in the PEFT layout; the message names the cause and the remedy.

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
