"""A model seen through both libraries' names: each parameter of each layer, and the module there that holds it.

A scanned stack `layers/attention/query/kernel` of shape (L, d, d) is L leaves here, one for each name that PEFT uses.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft import trees
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.models.encoder_decoder import EncoderDecoder
from jaxpeft.models.names import to_hf

HEAD = "classifier"


class Leaf(NamedTuple):
    """One parameter of one layer.

    Attributes:
      path: in `params`.
      layer: the index in the stack that `path` holds; None where it is not stacked.
      module: path of the module there, `bert.encoder.layer.0.attention.self.query`.
      name: of the parameter in that module ("weight", "bias"), or "" where a larger module holds it bare.
      transform: between the two arrays, as in `models.names`.
      shape: ours, without the stack.
    """

    path: str
    layer: int | None
    module: str
    name: str
    transform: str
    shape: tuple[int, ...]

    @property
    def full_name(self) -> str:
        """Of the parameter there."""
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def kind(self) -> str:
        """ "linear", "embedding" or "conv" where PEFT has a low-rank layer for it, else ""."""
        if self.name != "weight" or len(self.shape) < 2:
            return ""
        if self.transform == "conv":
            return "conv"
        last = self.path.rpartition("/")[2]
        return {"kernel": "linear", "embedding": "embedding"}.get(last, "") if len(self.shape) == 2 else ""


class View:
    """The leaves of `params`, which belong to `model`, and the modules they lie in.

    Attributes:
      model, params: the model and its variables, `{"params": ...}`.
      values: the parameters by path.
      leaves: every parameter of every layer.
      modules: every module that PEFT could meet in the model there, containers and unused heads included.
    """

    def __init__(self, model: Any, params: Any):
        if not hasattr(model, "name_rows"):
            raise InterchangeError(
                f"{type(model).__name__} has no Hugging Face names: interchange is for the models of jaxpeft.models; "
                "use save_delta for others"
            )
        params = params if set(params) == {"params"} else {"params": params}
        self.model, self.params, self.values = model, params, trees.by_path(params)
        rows = model.name_rows()
        self.leaves: list[Leaf] = []
        for path, x in self.values.items():
            found = to_hf(rows, path.removeprefix("params/"))
            if found is None:
                raise InterchangeError(f"{path!r} is no parameter of {type(model).__name__} with a Hugging Face name")
            row, name, _ = found
            stacked = "{i}" in name
            for i in range(x.shape[0]) if stacked else [None]:
                module, _, own = name.replace("{i}", str(i)).rpartition(".")
                module, own = (module, own) if own in ("weight", "bias") else (f"{module}.{own}", "")
                shape = tuple(x.shape[1:] if stacked else x.shape)
                self.leaves.append(Leaf(path, i, module, own, row.transform, shape))
        unused = {row.hf.rpartition(".")[0] for row in rows if "{i}" not in row.hf}
        self.modules = sorted({c for m in {leaf.module for leaf in self.leaves} | unused for c in containers(m)})
        self._of: dict[str, list[Leaf]] = {}
        for leaf in self.leaves:
            self._of.setdefault(leaf.path, []).append(leaf)

    def of(self, path: str) -> list[Leaf]:
        """The leaves at `path`, in the order of the stack."""
        if path not in self._of:
            raise InterchangeError(f"the delta has {path!r}, which the model lacks{trees.near(path, self._of)}")
        return self._of[path]

    def unstacked(
        self, path: str, arrays: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[Leaf, dict[str, np.ndarray]]]:
        """One layer's arrays after another. The delta must hold exactly `names` at `path`."""
        if set(arrays) != set(names):
            raise InterchangeError(f"the delta holds {sorted(arrays)} at {path!r}, its method {sorted(names)}")
        host = {k: np.asarray(x.value if isinstance(x, trees.Fixed) else x) for k, x in arrays.items()}
        for leaf in self.of(path):
            yield leaf, host if leaf.layer is None else {k: x[leaf.layer] for k, x in host.items()}

    def stacked(self, found: Mapping[Leaf, Any], what: str) -> dict[str, Any]:
        """Values by leaf as values by path: those of a stack in a list, in order.

        Raises:
          InterchangeError: a stack of which some layers are absent.
        """
        out: dict[str, Any] = {}
        for path in dict.fromkeys(leaf.path for leaf in found):
            layers = self.of(path)
            if absent := [leaf.module for leaf in layers if leaf not in found]:
                raise InterchangeError(
                    f"{what} is on some layers of the scanned stack {path!r} and not on {', '.join(absent[:3])}: "
                    "a scanned stack adapts all of its layers or none. Load the model with scan=False"
                )
            out[path] = found[layers[0]] if layers[0].layer is None else [found[leaf] for leaf in layers]
        return out

    def patterns(self, paths: Iterable[str]) -> str | list[str]:
        """The shortest patterns that choose exactly `paths`: layers in which all is chosen share one."""
        paths = set(paths)
        wide = {path: re.sub(r"layers_\d+", "layers_*", path) for path in sorted(paths, key=_numbered)}
        fits = {w: set(trees.matches(w, self.values)) <= paths for w in set(wide.values())}
        out = list(dict.fromkeys(w if fits[w] else path for path, w in wide.items()))
        return out[0] if len(out) == 1 else out


def containers(module: str) -> list[str]:
    """`module` and every module around it."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def shortest(chosen: Iterable[str], among: Collection[str], hits: Callable[[str, str], bool]) -> list[str]:
    """The shortest endings of module paths under which `hits(ending, module)` chooses exactly `chosen` of `among`."""
    chosen = set(chosen)
    fits: dict[str, bool] = {}
    out = []
    for module in sorted(chosen, key=_numbered):
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            ending = ".".join(parts[-n:])
            if ending not in fits:
                fits[ending] = all(m in chosen for m in among if hits(ending, m))
            if fits[ending]:
                out.append(ending)
                break
        else:
            raise InterchangeError(f"no PEFT name chooses {module!r} without choosing other modules, too")
    return list(dict.fromkeys(out))


def by_ending(ending: str, module: str) -> bool:
    """How PEFT reads `target_modules` given as a list."""
    return module == ending or module.endswith(f".{ending}")


def by_letters(ending: str, module: str) -> bool:
    """How PEFT reads `modules_to_save` and `feedforward_modules`: any ending, not only at a dot."""
    return module.endswith(ending)


def by_regex(pattern: str, module: str) -> bool:
    """How PEFT reads the keys of `rank_pattern` and `alpha_pattern`."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def is_shared(view: View, leaf: Leaf) -> str:
    """Why the word table must stay as it is, or nothing.

    Here an adapted table is adapted wherever it is used. There, the modules that share it keep the old one.
    """
    if not leaf.path.endswith("embeddings/word/embedding") or not hasattr(view.model.config, "tied"):
        return ""
    if isinstance(view.model, EncoderDecoder):
        return "T5's encoder and decoder look up in copies of this table that PEFT leaves as they were"
    return "the head shares this table, and PEFT adapts the look-up alone" if view.model.config.tied else ""


def stack(values: Any) -> Any:
    """A list of layers as one array; a single array as it is."""
    return jnp.stack([jnp.asarray(x) for x in values]) if isinstance(values, list) else jnp.asarray(values)


def contiguous(x: np.ndarray) -> np.ndarray:
    """A contiguous copy where it is none: safetensors 0.8.0 writes strided and transposed arrays as garbage."""
    return np.asarray(x, order="C")


def most_common(values: Sequence[Any]) -> Any:
    """The value that stands most often; the first of those where several do."""
    return max(dict.fromkeys(values), key=list(values).count)


def _numbered(path: str) -> list[Any]:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", path)]
