"""Names of parameters here and in Hugging Face folders, one table a family, read in both directions.

A row joins our path template with a tensor name template and the transform between the two arrays:

    Row("layers_{i}/attention/query/kernel", "encoder.layer.{i}.attention.self.query.weight", "transpose")

`{i}` stands for a layer's number. `hf` is the parameter's name inside the transformers 5 module tree, after which PEFT
adapters are named; `stored` is the name in files where the two differ (ViT).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

# name -> (from the stored array to ours, from ours to the stored one)
TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda x: x, lambda x: x),
    "transpose": (lambda x: x.T, lambda x: x.T),  # (out, in) <-> (in, out)
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW <-> HWIO
    "drop_axis": (lambda x: x[0], lambda x: x[None]),  # (1, ...) <-> (...)
    "add_axis": (lambda x: x[None], lambda x: x[0]),  # (...) <-> (1, ...)
}

# What each transform does to a shape and back, without an array.
_SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "same": lambda s: s,
    "transpose": lambda s: s[::-1],
    "conv": lambda s: (s[3], s[2], s[0], s[1]),
    "drop_axis": lambda s: (1, *s),
    "add_axis": lambda s: s[1:],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter's path here, its name there, and the transform between them."""

    ours: str
    hf: str
    transform: str = "same"
    stored: str | None = None

    @property
    def file_name(self) -> str:
        return self.stored or self.hf


def stored_shape(transform: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the folder of a parameter that has `shape` here."""
    return _SHAPES[transform](shape)


def dense_rows(ours: str, hf: str, *, stored: str | None = None, transform: str = "transpose") -> list[Row]:
    """Kernel and bias of a Dense; `transform="same"` for GPT-2's (in, out) kernels."""
    return [
        Row(f"{ours}/kernel", f"{hf}.weight", transform, stored and f"{stored}.weight"),
        Row(f"{ours}/bias", f"{hf}.bias", "same", stored and f"{stored}.bias"),
    ]


def norm_rows(ours: str, hf: str, *, stored: str | None = None) -> list[Row]:
    """Scale and, where it has one, bias of a norm."""
    return [
        Row(f"{ours}/scale", f"{hf}.weight", "same", stored and f"{stored}.weight"),
        Row(f"{ours}/bias", f"{hf}.bias", "same", stored and f"{stored}.bias"),
    ]


def embed_row(ours: str, hf: str) -> Row:
    return Row(f"{ours}/embedding", f"{hf}.weight")


def under(rows: Iterable[Row], ours: str, hf: str) -> list[Row]:
    """The rows one level deeper: `ours` before our paths, `hf` before the tensor names."""
    return [
        Row(ours + row.ours, hf + row.hf, row.transform, None if row.stored is None else hf + row.stored)
        for row in rows
    ]


def to_hf(rows: Sequence[Row], path: str) -> tuple[Row, str, str] | None:
    """The row of our `path`, the module-tree name and the file name; None if no row matches.

    A stacked path (`.../layers/...`) gives names that still hold `{i}`.
    """
    for row in rows:
        found = _pattern(row.ours).fullmatch(path)
        if found:
            number = found.groups()[0] if found.groups() else "{i}"
            return row, row.hf.replace("{i}", number), row.file_name.replace("{i}", number)
        if "layers_{i}/" in row.ours and path == row.ours.replace("layers_{i}/", "layers/"):
            return row, row.hf, row.file_name
    return None


def to_ours(rows: Sequence[Row], name: str) -> tuple[Row, str] | None:
    """The row of a tensor called `name`, by module tree or in files, and our unrolled path; None if none."""
    for row in rows:
        for template in (row.hf, row.stored):
            found = template and _pattern(template).fullmatch(name)
            if found:
                return row, row.ours.replace("{i}", found.groups()[0]) if found.groups() else row.ours
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))
