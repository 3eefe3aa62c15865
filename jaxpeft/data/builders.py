"""tensorflow-datasets builders of the built-in sets, prepared as ArrayRecord and read without TensorFlow.

Importing this module imports tensorflow-datasets; `jaxpeft.data.load` does so on first use.

| name | what | train | test | split |
|---|---|---|---|---|
| `r8` | Reuters-21578, the 8 most frequent topics | 5,485 | 2,189 | standard |
| `r52` | Reuters-21578, all 52 single topics | 6,532 | 2,568 | standard |
| `20ng` | 20 Newsgroups, by date | 11,293 | 7,528 | standard |
| `digits` | scikit-learn's digits, 8 x 8, pixels 0..16 | 1,437 | 360 | stratified, seed 0 |
| `mnist-5k` | 500 MNIST digits of each class, 28 x 28 | 4,000 | 1,000 | stratified, seed 0 |
| `fashion-mnist` | Fashion-MNIST, 28 x 28 | 60,000 | 10,000 | standard |

Reuters and newsgroups texts are lower-case letters and spaces only (A. Cardoso-Cachopo's "all terms" version).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow_datasets as tfds

from jaxpeft.data import _raw
from jaxpeft.data._order import held_out
from jaxpeft.data.assets import fetch

_DIGITS = tuple("0123456789")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What all of them share: `LABELS`, `COUNTS`, `KIND` and how one split's examples come."""

    VERSION = tfds.core.Version("1.0.0")
    KIND: ClassVar[Literal["text", "image"]]
    LABELS: ClassVar[tuple[str, ...]]
    COUNTS: ClassVar[dict[str, int]]

    def _content(self) -> Any:
        """The feature beside the label."""
        raise NotImplementedError

    def _pairs(self, split: str) -> Iterator[tuple[Any, Any]]:
        """(content, label) in the source's order."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {self.KIND: self._content(), "label": tfds.features.ClassLabel(names=list(self.LABELS))}
            ),
            supervised_keys=(self.KIND, "label"),
            disable_shuffling=True,  # index i is row i of the source, on every machine
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the asset cache fetches, verifies and works offline
        return {split: self._generate_examples(split) for split in self.COUNTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (content, label) in enumerate(self._pairs(split)):
            yield index, {self.KIND: content, "label": label}


class _TextBuilder(_Builder, skip_registration=True):
    """A pair of tab-separated files with the columns Category and Text."""

    KIND = "text"
    FILES: ClassVar[str]

    def _content(self) -> Any:
        return tfds.features.Text()

    def _pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for row in _raw.tab_rows(fetch("orange-text") / f"{self.FILES}-{split}.tab"):
            yield row["Text"].strip(), row["Category"].strip()


class _ImageBuilder(_Builder, skip_registration=True):
    """Arrays in memory. Pixels are kept as plain bytes: decoding 70,000 PNGs would take longer than reading."""

    KIND = "image"
    LABELS = _DIGITS
    SHAPE: ClassVar[tuple[int, int, int]] = (28, 28, 1)

    def _content(self) -> Any:
        return tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8)

    def _arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _pairs(self, split: str) -> Iterator[tuple[np.ndarray, int]]:
        images, labels = self._arrays(split)
        yield from zip(images.reshape(-1, *self.SHAPE), labels.tolist())

    def _part(self, arrays: tuple[np.ndarray, np.ndarray], split: str) -> tuple[np.ndarray, np.ndarray]:
        """The fixed stratified test part of a set that comes in one piece, or what it leaves."""
        images, labels = arrays
        test = held_out(labels, self.COUNTS["test"], seed=0)
        keep = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
        return images[keep], labels[keep]


class ReutersR8(_TextBuilder, skip_registration=True):
    """Reuters R8."""

    FILES = "reuters-r8"
    LABELS = _names("acq crude earn grain interest money-fx ship trade")
    COUNTS: ClassVar = {"train": 5485, "test": 2189}


class ReutersR52(_TextBuilder, skip_registration=True):
    """Reuters R52; its rarest topic has one training example."""

    FILES = "reuters-r52"
    LABELS = _names(
        "acq alum bop carcass cocoa coffee copper cotton cpi cpu crude dlr earn fuel gas gnp gold grain heat "
        "housing income instal-debt interest ipi iron-steel jet jobs lead lei livestock lumber meal-feed "
        "money-fx money-supply nat-gas nickel orange pet-chem platinum potato reserves retail rubber ship "
        "strategic-metal sugar tea tin trade veg-oil wpi zinc"
    )
    COUNTS: ClassVar = {"train": 6532, "test": 2568}


class Newsgroups20(_TextBuilder, skip_registration=True):
    """20 Newsgroups, split by date."""

    FILES = "20newsgroups"
    LABELS = _names(
        "alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware comp.sys.mac.hardware "
        "comp.windows.x misc.forsale rec.autos rec.motorcycles rec.sport.baseball rec.sport.hockey sci.crypt "
        "sci.electronics sci.med sci.space soc.religion.christian talk.politics.guns talk.politics.mideast "
        "talk.politics.misc talk.religion.misc"
    )
    COUNTS: ClassVar = {"train": 11293, "test": 7528}


class Digits(_ImageBuilder, skip_registration=True):
    """scikit-learn's digits."""

    SHAPE = (8, 8, 1)
    COUNTS: ClassVar = {"train": 1437, "test": 360}

    def _arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return self._part(_raw.digits(), split)


class Mnist5k(_ImageBuilder, skip_registration=True):
    """500 MNIST images of each digit."""

    COUNTS: ClassVar = {"train": 4000, "test": 1000}

    def _arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return self._part(_raw.mnist_5k(fetch("mnist-5k") / "mnist_5k.csv.gz"), split)


class FashionMnist(_ImageBuilder, skip_registration=True):
    """Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747, 2017)."""

    LABELS = _names("t-shirt/top trouser pullover dress coat sandal shirt sneaker bag ankle-boot")
    COUNTS: ClassVar = {"train": 60000, "test": 10000}

    def _arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        folder, stem = fetch("fashion-mnist"), {"train": "train", "test": "t10k"}[split]
        images = _raw.idx_array(folder / f"{stem}-images-idx3-ubyte.gz")
        return images, _raw.idx_array(folder / f"{stem}-labels-idx1-ubyte.gz").astype(np.int32)


BUILDERS: dict[str, type[_Builder]] = {
    "r8": ReutersR8,
    "r52": ReutersR52,
    "20ng": Newsgroups20,
    "digits": Digits,
    "mnist-5k": Mnist5k,
    "fashion-mnist": FashionMnist,
}
"""The builder of each built-in set."""
