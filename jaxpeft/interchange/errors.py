"""The one error of this package."""

from jaxpeft.tensor_names import TensorNamesError


class InterchangeError(TensorNamesError):
    """An adapter that cannot be written or read in the PEFT layout."""
