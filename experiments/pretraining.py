"""Bases that an experiment trains once itself: kept in the cache, by what made them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxpeft import data, trees
from jaxpeft.files import write_atomically


def kept(name: str, made_from: Mapping[str, Any], params: Any, train: Callable[[Any], Any], keep: bool = True) -> Any:
    """`train(params)`, or what an earlier call with the same `made_from` (plain data) gave.

    Args:
      name: of the file in the cache.
      made_from: everything that decides the result.
      params: at the start; the result has its structure.
      train: `(params) -> params`.
      keep: whether to read and write the cache at all.
    """
    code = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    path = data.cache_dir() / "experiments" / f"{name}-{code}.safetensors"
    if keep and path.exists():
        return trees.replace_leaves(params, {p: jnp.asarray(x) for p, x in load_file(path).items()})
    params = train(params)
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = {p: np.asarray(x, order="C") for p, x in trees.by_path(params).items()}
        write_atomically(path, lambda p: save_file(flat, p))
    return params
