"""Texts to token ids, once: a fast tokenizer read from `tokenizer.json`, and token arrays kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, Int64

from jaxpeft.data._files import AssetError, cache_dir, written
from jaxpeft.data.assets import model_folder

__all__ = ["Ragged", "Tokenizer"]

_FORMAT = b"jaxpeft tokens 1"  # changes when what is stored changes, so that old files are not read as new ones


@dataclass(frozen=True, eq=False)
class Ragged:
    """Sequences of different lengths, end to end in one array.

    Attributes:
      ids: (total,) int32.
      offsets: (n + 1,) int64; sequence i is `ids[offsets[i]:offsets[i + 1]]`.
    """

    ids: Int32[np.ndarray, "total"]
    offsets: Int64[np.ndarray, "n+1"]

    def __post_init__(self) -> None:
        offsets = self.offsets
        whole = offsets.ndim == 1 and offsets.size and offsets[0] == 0 and offsets[-1] == self.ids.size
        if not whole or (np.diff(offsets) < 0).any():
            raise ValueError("offsets must rise from 0 to the number of ids")
        self.ids.setflags(write=False)
        self.offsets.setflags(write=False)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int] | Int[np.ndarray, "t"]]) -> Ragged:
        """From a list of sequences of ids."""
        offsets = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
        ids = np.fromiter((i for sequence in sequences for i in sequence), np.int32, int(offsets[-1]))
        return cls(ids, offsets)

    @property
    def lengths(self) -> Int64[np.ndarray, "n"]:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int32[np.ndarray, "t"]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Int32[np.ndarray, "t"]]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | Int[np.ndarray, "m"]) -> Ragged:
        """The sequences at `indices`, in that order."""
        return Ragged.of([self[int(index)] for index in indices])

    def padded(
        self, indices: Int[np.ndarray, "b"], length: int, pad_id: int
    ) -> tuple[Int32[np.ndarray, "b {length}"], Int32[np.ndarray, "b {length}"]]:
        """Rows of ids and their mask (1 where a token is, 0 where padding).

        Args:
          indices: (b,) which sequences; none may be longer than `length`.
          length: columns.
          pad_id: what fills the rest.
        """
        start, size = self.offsets[:-1][indices], self.lengths[indices]
        if size.size and size.max() > length:
            raise ValueError(f"a sequence of {size.max()} tokens does not fit into {length}")
        column = np.arange(length)
        mask = column < size[:, None]
        rows = np.full(mask.shape, pad_id, np.int32)
        rows[mask] = self.ids[(start[:, None] + column)[mask]]
        return rows, mask.astype(np.int32)


class Tokenizer:
    """A tokenizer read from `tokenizer.json`.

    Args:
      source: what `model_folder` takes (a built-in name, a local folder, a hub id), or a path to a `tokenizer.json`.

    Raises:
      AssetError: there is no such file, or it is not a tokenizer.

    Example:
      tokenizer = Tokenizer("all-MiniLM-L6-v2")
      tokens = tokenizer.encode(data.train.inputs, max_length=256)     # Ragged; the second time from the cache
    """

    def __init__(self, source: str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            folder = path if path.is_dir() else model_folder(source)
            path = folder / "tokenizer.json"
        self.path = path
        try:
            self._json = path.read_text(encoding="utf-8")
            self._plain = self._make(None)
        except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
            raise AssetError(f"{path} is not a tokenizer: {error}") from error
        self._declared = _declared(path.parent)

    def _make(self, max_length: int | None):
        import tokenizers

        # The file may carry truncation and padding of its own (MiniLM's: 128); lengths are ours to say.
        made = tokenizers.Tokenizer.from_str(self._json)
        made.no_padding()
        made.no_truncation()
        if max_length is not None:
            made.enable_truncation(max_length)
        return made

    @functools.cached_property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self._plain.get_vocab_size()

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """Ids of the special tokens that exist, by role: pad, cls, sep, unk, mask, bos, eos."""
        usual = {
            "pad": ("[PAD]", "<pad>"),
            "cls": ("[CLS]", "<s>"),
            "sep": ("[SEP]", "</s>"),
            "unk": ("[UNK]", "<unk>"),
            "mask": ("[MASK]", "<mask>"),
            "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
            "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
        }
        found = {}
        for role, names in usual.items():
            declared = self._declared.get(role)
            for name in (declared,) if declared is not None else names:
                if (number := self._plain.token_to_id(name)) is not None:
                    found[role] = number
                    break
        return found

    @property
    def pad_id(self) -> int:
        """The padding id; where there is none, the end id, else 0 (the mask hides it either way)."""
        return self.special.get("pad", self.special.get("eos", 0))

    def encode(self, texts: Sequence[str], max_length: int, *, cache: bool = True) -> Ragged:
        """Token ids of each text, special tokens included.

        Args:
          texts: n strings.
          max_length: longer texts are cut so that their special tokens still fit; at least 3.
          cache: keep the result on disk, under a hash of tokenizer, length and texts, and read it there next time.

        Returns:
          n sequences of at most `max_length` ids.

        Raises:
          ValueError: `max_length` is under 3, or something in `texts` is not a string.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings, not one string")
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}; two special tokens and one of the text need 3")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {index} is {type(text).__name__}, not a string")
        if not cache:
            return self._encode(texts, max_length)
        path = cache_dir() / "tokens" / f"{self._key(texts, max_length)}.npz"
        if (known := _read(path, len(texts))) is not None:
            return known
        tokens = self._encode(texts, max_length)
        with written(path) as file:
            np.savez(file, ids=tokens.ids, offsets=tokens.offsets)
        return tokens

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "t"], *, skip_special: bool = True) -> str:
        """The text of a sequence of ids."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _encode(self, texts: Sequence[str], max_length: int) -> Ragged:
        made = self._make(max_length)
        pieces, lengths = [], []
        for start in range(0, len(texts), 4096):  # bounds what the encodings with all their offsets and masks take
            for encoding in made.encode_batch_fast(list(texts[start : start + 4096])):
                pieces.append(np.asarray(encoding.ids, np.int32))
                lengths.append(len(pieces[-1]))
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        return Ragged(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def _key(self, texts: Sequence[str], max_length: int) -> str:
        import tokenizers

        digest = hashlib.blake2b(_FORMAT, digest_size=20)
        for part in (tokenizers.__version__, self._json, str(max_length), *texts):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))  # so that ["ab", "c"] and ["a", "bc"] differ
            digest.update(data)
        return digest.hexdigest()


def _read(path: Path, count: int) -> Ragged | None:
    """What is stored, or None if nothing whole is (the archive carries checksums of its own)."""
    try:
        # np.load leaves a file open that it fails to read, unless someone else owns it
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            tokens = Ragged(stored["ids"], stored["offsets"])
        return tokens if len(tokens) == count and tokens.ids.dtype == np.int32 else None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error):
        return None


def _declared(folder: Path) -> dict[str, str]:
    """The special tokens that `special_tokens_map.json` or `tokenizer_config.json` beside the tokenizer declares."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for role in ("pad", "cls", "sep", "unk", "mask", "bos", "eos"):
            value = content.get(f"{role}_token") if isinstance(content, dict) else None
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[role] = value
    return found
