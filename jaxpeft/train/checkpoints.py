"""Orbax checkpoints of a run: delta, optimiser, data position, seed. Atomic, and resumable to the same numbers.

The frozen base is never stored. Orbax writes into a temporary folder and commits it by renaming, so that a run killed
while saving leaves its previous checkpoint. Orbax may restore a tree that only partly fits without a word: structure,
shapes and dtypes are therefore compared first.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxpeft import trees
from jaxpeft.train.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is not there or does not fit."""


class Checkpoints:
    """The checkpoints of one run folder.

    Every process of a multi-host run calls `save` and `restore`; Orbax divides the work.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self.folder = Path(folder).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes the state at its step. `meta` is plain data (the data's position, the config's fingerprint)."""
        tree = _plain(state)
        listing = {p: [list(x.shape), str(x.dtype)] for p, x in tree.items()}
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({"meta": meta, "leaves": listing})
            ),
        )
        self._manager.wait_until_finished()

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The plain data saved with a checkpoint."""
        return self._read(step)["meta"]

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (the newest by default), with the structure and shardings of `like`.

        Raises:
          CheckpointError: no checkpoint, or one whose leaves differ from `like`: what differs is listed.
        """
        step = self.latest() if step is None else step
        tree = _plain(like)
        have, want = self._read(step)["leaves"], {p: [list(x.shape), str(x.dtype)] for p, x in tree.items()}
        if have != want:
            missing, left = sorted(set(want) - set(have)), sorted(set(have) - set(want))
            other = [
                f"{p}: {have[p]} instead of {want[p]}" for p in sorted(set(have) & set(want)) if have[p] != want[p]
            ]
            raise CheckpointError(
                f"the checkpoint in {self.folder} is of another run: missing {missing[:3]}, left over {left[:3]}, "
                f"other shapes {other[:3]}. Resume with the configuration it was made with"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        leaves, structure = jax.tree.flatten(like)
        paths = list(trees.by_path(like))
        return jax.tree.unflatten(structure, [found[_safe(p)] for p, _ in zip(paths, leaves)])

    def _read(self, step: int | None) -> dict[str, Any]:
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"there is no whole checkpoint in {self.folder}: nothing to resume")
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        self._manager.close()


def _safe(path: str) -> str:
    return path.replace("/", "|")  # Orbax takes a slash in a name for a folder


def _plain(state: TrainState) -> dict[str, PyTree]:
    return {_safe(p): x if isinstance(x, jax.Array) else np.asarray(x) for p, x in trees.by_path(state).items()}
