"""The files of the built-in sets, read into plain rows: what the builders prepare."""

from __future__ import annotations

import csv
import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jaxpeft.data._files import AssetError


def tab_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a tab-separated file with three header lines (names, types, roles), keyed by the names.

    Rows without any content are skipped: one stands under the header, sometimes as an empty line, sometimes as two
    empty columns. Quotation marks are letters here, not syntax: no field spans lines.

    Raises:
      AssetError: a row has another number of columns than the header.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names, _, _ = next(reader), next(reader), next(reader)
        for number, row in enumerate(reader, start=4):
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(names):
                raise AssetError(f"{path.name}, row {number}: {len(row)} columns instead of {len(names)}")
            yield dict(zip(names, row))


def idx_array(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array in a gzip-compressed IDX file of unsigned bytes.

    Raises:
      AssetError: it is not such a file, or its length is not what its header says.
    """
    with gzip.open(path) as file:
        data = file.read()
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise AssetError(f"{path.name} is not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise AssetError(f"{path.name} holds {body.size} bytes, its header says {shape}")
    return body.reshape(shape)


def mnist_5k(path: Path) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int[np.ndarray, "n"]]:
    """Images and labels of the table: 784 pixels and the label in each row."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    if table.ndim != 2 or table.shape[1] != 785:
        raise AssetError(f"{path.name} has shape {table.shape}, not (n, 785)")
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


def digits() -> tuple[UInt8[np.ndarray, "n 8 8 1"], Int[np.ndarray, "n"]]:
    """scikit-learn's 1,797 digits with pixels 0..16."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    return np.asarray(images).astype(np.uint8).reshape(-1, 8, 8, 1), np.asarray(labels).astype(np.int32)
