"""A delta on disk: one safetensors file and its configuration, for every method.

    folder/
      jaxpeft.json          the method's config, the base's fingerprint, what the library's version was
      delta.safetensors     the arrays under their paths; `Fixed` ones are listed in the config

Methods that Hugging Face PEFT knows can be written in its layout instead; see `interchange`. A hypernetwork's weights are kept
likewise, in files of their own names.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxpeft import trees
from jaxpeft.hyper.hypernetwork import Hypernetwork, TargetError
from jaxpeft.method import Delta, Method, Params, from_config

CONFIG, ARRAYS = "jaxpeft.json", "delta.safetensors"
HYPER_CONFIG, HYPER_ARRAYS = "hypernetwork.json", "hypernetwork.safetensors"


class DeltaError(ValueError):
    """A delta's folder that is not whole, or that belongs to another base."""


class Saved(NamedTuple):
    """What a folder holds."""

    delta: Delta
    method: Method
    extra: dict[str, Any]


def save_delta(folder: Path | str, delta: Delta, method: Method, params: Params, **extra: Any) -> Path:
    """Writes a delta, whole or not at all.

    Args:
      folder: made if missing; an older delta in it is replaced.
      delta: of `method`.
      method: its config is stored, so that the folder alone makes the method again.
      params: the base, of which names and shapes are stored as a fingerprint.
      extra: plain data to keep with it (labels, metrics).
    """
    flat = trees.by_path(delta, is_leaf=_is_fixed)
    keys = {
        trees.path_string(p): [k.key for k in p] for p, _ in jtu.tree_flatten_with_path(delta, is_leaf=_is_fixed)[0]
    }
    fixed = sorted(p for p, x in flat.items() if isinstance(x, trees.Fixed))
    arrays = {p: x.value if isinstance(x, trees.Fixed) else x for p, x in flat.items()}
    config = {
        "format": 1,
        "method": to_plain(method.config),
        "fingerprint": trees.fingerprint(params),
        "fixed": fixed,
        "keys": keys,
        "parameters": trees.count(trees.learned(delta)[0]),
        **extra,
    }
    return _write(Path(folder), (ARRAYS, arrays), (CONFIG, config))


def load_delta(folder: Path | str, params: Params | None = None) -> Saved:
    """Reads a delta.

    Args:
      folder: as written by `save_delta`.
      params: the base to be used with; its fingerprint is compared.

    Raises:
      DeltaError: no such folder, a truncated or foreign file, arrays that the config does not describe, another base.
    """
    folder = Path(folder)
    config = _config(folder)
    try:
        arrays = load_file(folder / ARRAYS)
    except (OSError, SafetensorError, ValueError) as e:
        raise DeltaError(
            f"{folder / ARRAYS} cannot be read ({e}): it is missing or cut short; save the delta again"
        ) from e
    if params is not None and (own := trees.fingerprint(params)) != config["fingerprint"]:
        raise DeltaError(
            f"the delta in {folder} was made for a base with fingerprint {config['fingerprint']}, this one has {own}: "
            "their parameters differ in names or shapes" + _first_stranger(arrays, params)
        )
    keys, fixed = config["keys"], set(config["fixed"])
    if set(keys) != set(arrays):
        missing, left = sorted(set(keys) - set(arrays)), sorted(set(arrays) - set(keys))
        raise DeltaError(f"{folder / ARRAYS} and {CONFIG} differ: missing {missing[:3]}, left over {left[:3]}")
    delta = _nested({p: trees.Fixed(jnp.asarray(x)) if p in fixed else jnp.asarray(x) for p, x in arrays.items()}, keys)
    known = {"format", "method", "fingerprint", "fixed", "keys", "parameters"}
    return Saved(delta, from_config(config["method"]), {k: v for k, v in config.items() if k not in known})


def _is_fixed(x: Any) -> bool:
    return isinstance(x, trees.Fixed)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise DeltaError(f"there is no {CONFIG} in {folder}: it is not the folder of a delta")
    try:
        config = json.loads(path.read_text())
        missing = {"method", "fingerprint", "fixed", "keys"} - set(config)
    except (json.JSONDecodeError, TypeError) as e:
        raise DeltaError(f"{path} is not the configuration of a delta: {e}") from e
    if missing:
        raise DeltaError(f"{path} lacks {sorted(missing)}")
    return config


def _first_stranger(arrays: Mapping[str, Any], params: Params) -> str:
    paths = trees.by_path(params)
    for name in arrays:
        if not any(p in name for p in paths) and (hint := trees.near(name.rpartition("/")[0], paths)):
            return f" ({name!r} fits nothing{hint})"
    return ""


def _nested(flat: Mapping[str, Any], keys: Mapping[str, list[str]]) -> Delta:
    tree: dict[str, Any] = {}
    for name, x in flat.items():
        *way, last = keys[name]
        at = tree
        for key in way:
            at = at.setdefault(key, {})
        at[last] = x
    return tree


# ---------------------------------------------------------------------------------------------------------- hypernetworks


def save_hypernetwork(folder: Path | str, hyper: Hypernetwork, weights: PyTree, **extra: Any) -> Path:
    """Writes a hypernetwork's weights and configuration, each whole or not at all; `extra` is plain data beside them."""
    config = {
        "format": 1,
        "name": hyper.name,
        "config": to_plain(hyper.config),
        "target": trees.fingerprint(hyper.target),
        **extra,
    }
    return _write(Path(folder), (HYPER_ARRAYS, trees.by_path(weights)), (HYPER_CONFIG, config))


def load_hypernetwork(folder: Path | str, hyper: Hypernetwork) -> PyTree:
    """Reads the weights of a hypernetwork, made anew for its target, as `save_hypernetwork` wrote them.

    Raises:
      TargetError: no such folder, a truncated file, another method, configuration or target.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / HYPER_CONFIG).read_text())
        arrays = load_file(folder / HYPER_ARRAYS)
    except (OSError, SafetensorError, ValueError) as e:
        raise TargetError(f"{folder} cannot be read as a hypernetwork's folder ({e})") from e
    own = {"name": hyper.name, "config": to_plain(hyper.config), "target": trees.fingerprint(hyper.target)}
    for key, value in own.items():
        if config.get(key) != value:
            raise TargetError(f"{folder} holds a hypernetwork with {key} {config.get(key)}, this one has {value}")
    like = jax.eval_shape(hyper.init, jax.random.key(0))
    paths = trees.by_path(like)
    wrong = [p for p, x in paths.items() if p not in arrays or arrays[p].shape != x.shape]
    if wrong or set(arrays) - set(paths):
        raise TargetError(
            f"{folder / HYPER_ARRAYS} does not fit {HYPER_CONFIG}: {(wrong or sorted(set(arrays) - set(paths)))[:3]}"
        )
    return trees.replace_leaves(like, {p: jnp.asarray(x) for p, x in arrays.items()})


# -------------------------------------------------------------------------------------------------------------- the parts


def _write(folder: Path, arrays: tuple[str, Mapping[str, Any]], config: tuple[str, Mapping[str, Any]]) -> Path:
    """Two named files into a folder, which is made if missing; each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    # The writer stores strided and transposed arrays wrongly (safetensors 0.8.0): everything is made contiguous
    # (not by `ascontiguousarray`, which makes vectors of scalars).
    held = {p: np.asarray(x, order="C") for p, x in arrays[1].items()}
    write_atomically(folder / arrays[0], lambda path: save_file(held, path))
    write_atomically(folder / config[0], lambda path: path.write_text(json.dumps(config[1], indent=1) + "\n"))
    return folder


def to_plain(x: Any) -> Any:
    """Config values as JSON can hold them: arrays become numbers or lists, tuples lists."""
    if isinstance(x, Mapping):
        return {str(k): to_plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [to_plain(v) for v in x]
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return np.asarray(x).tolist()
    return x


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write(temporary path)`, flushes it to disk, then renames: a crash leaves the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
