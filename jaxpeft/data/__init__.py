"""Real data and models, fetched once: data sets, tokens, batches.

    data = load("r8")
    tokenizer = Tokenizer("all-MiniLM-L6-v2")
    tokens = tokenizer.encode(data.train.inputs, max_length=256)
    batches = text_batches(tokens, data.train.labels, batch_size=32, seed=0, pad_id=tokenizer.pad_id)
    for batch in batches.at(0):
        ...

`jaxpeft.data.augmix` is imported by that name: it alone needs jax, and the room is light without it.

Environment: `JAXPEFT_CACHE` (where things are kept), `JAXPEFT_OFFLINE=1` (nothing is fetched).
"""

from jaxpeft.data.assets import ASSETS, MODELS, AssetError, cache_dir, fetch, model_folder
from jaxpeft.data.batches import (
    BUCKETS,
    Batches,
    ImageBatch,
    TextBatch,
    image_batches,
    restore_order,
    text_batches,
)
from jaxpeft.data.datasets import NAMES, TEXTS, Dataset, DatasetError, Split, TextSet, load, load_text, subsample
from jaxpeft.data.manuals import ManualPages, manual_pages
from jaxpeft.data.mixture import Mixture, mixture, of_task, shares, together
from jaxpeft.data.tokens import Ragged, Tokenizer

__all__ = [
    "ASSETS",
    "BUCKETS",
    "MODELS",
    "NAMES",
    "TEXTS",
    "AssetError",
    "Batches",
    "Dataset",
    "DatasetError",
    "ImageBatch",
    "ManualPages",
    "Mixture",
    "Ragged",
    "Split",
    "TextBatch",
    "TextSet",
    "Tokenizer",
    "cache_dir",
    "fetch",
    "image_batches",
    "load",
    "load_text",
    "manual_pages",
    "mixture",
    "model_folder",
    "of_task",
    "restore_order",
    "shares",
    "subsample",
    "text_batches",
    "together",
]
