"""RandomFold: a weight read from a small memory by rotations and signs (Desai and Shrivastava, "In defense of parameter
sharing for model-compression", ICLR 2024).

Weights lie one behind another in a flat model, each row-major. The flat model is cut into chunks of the memory's length M,
and every chunk is the memory once over, rotated and signed:

    W[i] = g(i) memory[(u(c) + i mod M) mod M]        c = i // M, i the element's place in the flat model

Every place of the memory is therefore read n // M or n // M + 1 times by a model of n elements, and M = n gives a
bijection. u and g are hashes of 32 bits, of the chunk's number and of the element's:

    u(c) = align (mix(c ^ mix(seed ^ 0x9E3779B9)) mod (M / align))       g(i) = -1 where mix(i ^ mix(seed ^ 0x85EBCA6B)) is odd
    mix(x): x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16         modulo 2³²

(Wellons' lowbias32; not the hash of the paper's code.) Numbers of elements count modulo 2³².

Departure from the paper: rotations are multiples of `align`, so that aligned pieces of a weight are aligned pieces of the
memory, which a vector machine reads whole. A chunk is still a rotation and every place is read as often as before; what
is lost: two elements share a place only where their numbers agree modulo `align`. `align=1` is the paper's mapping.

Shape letters: M length of the memory, k rows, n columns.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int32, UInt32

from jaxpeft.kernels.platforms import KernelError, wide

__all__ = ["Fold", "materialise"]

LIMIT = 2**30  # positions and their sums are numbers of 32 bits


@dataclass(frozen=True)
class Fold:
    """Where a weight lies; static.

    Attributes:
      size: M.
      shape: (k, n) of the weight.
      offset: the weight's first element in the flat model.
      align: what rotations are multiples of; divides M.

    Raises:
      KernelError: a memory that is empty or no multiple of `align`, a negative offset, 2³⁰ elements or more.
    """

    size: int
    shape: tuple[int, int]
    offset: int = 0
    align: int = 128

    def __post_init__(self) -> None:
        if self.size < 1 or self.align < 1 or self.size % self.align:
            raise KernelError(
                f"a memory of {self.size} elements, align {self.align}: the memory's length is a multiple of align; "
                "lengthen it, or align=1"
            )
        if self.offset < 0 or len(self.shape) != 2 or min(self.shape) < 1:
            raise KernelError(
                f"shape {self.shape} at offset {self.offset}: expected (k, n), and an offset of 0 or more"
            )
        if self.size >= LIMIT or math.prod(self.shape) >= LIMIT:
            raise KernelError(f"a weight {self.shape} from {self.size} elements: both are under 2³⁰; split the weight")

    @property
    def unit(self) -> int:
        """Elements that lie together in weight and memory alike, from every multiple of it on."""
        return math.gcd(self.align, self.shape[1], self.offset)

    @property
    def first_chunk(self) -> int:
        return self.offset // self.size

    @property
    def phase(self) -> int:
        """The weight's first element within its chunk."""
        return self.offset % self.size

    @property
    def chunks(self) -> int:
        """How many chunks the weight touches."""
        return (self.phase + math.prod(self.shape) - 1) // self.size + 1

    def rotation(self, seed: UInt32[Array, ""], chunk: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
        """u of the weight's chunks, counted from its first."""
        key = mix(seed ^ jnp.uint32(0x9E3779B9))
        number = chunk.astype(jnp.uint32) + jnp.uint32(self.first_chunk % 2**32)
        turns = lax.rem(mix(number ^ key), jnp.full(number.shape, self.size // self.align, jnp.uint32))
        return turns.astype(jnp.int32) * jnp.int32(self.align)

    def place(self, seed: UInt32[Array, ""], element: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
        """Where in the memory the weight's elements lie, by their number in the weight."""
        # Split, so that no sum reaches 2³¹.
        whole = jnp.full(element.shape, self.size, jnp.int32)
        chunk, rest = lax.div(element, whole), lax.rem(element, whole) + jnp.int32(self.phase)
        chunk, rest = chunk + (rest >= whole).astype(jnp.int32), jnp.where(rest >= whole, rest - whole, rest)
        place = self.rotation(seed, chunk) + rest
        return jnp.where(place >= whole, place - whole, place)

    def negative(self, key: UInt32[Array, "*_"], element: Int32[Array, "*s"]) -> Array:
        """Where g is -1; `key` is `sign_key(seed)`."""
        number = element.astype(jnp.uint32) + jnp.uint32(self.offset % 2**32)
        return (mix(number ^ key) & jnp.uint32(1)) == jnp.uint32(1)

    def rows(self, memory: Float[Array, "M"], seed: UInt32[Array, ""], row: Any, count: int) -> Float[Array, "c n"]:
        """`count` rows of the weight from `row` on."""
        pieces = memory.reshape(-1, self.unit)[self._pieces(seed, row, count)]
        flat = pieces.reshape(count, self.shape[1])
        return jnp.where(self._negative_rows(seed, row, count), -flat, flat)

    def gather_back(self, d: Float[Array, "c n"], seed: UInt32[Array, ""], row: Any) -> Float[Array, "M"]:
        """What `rows` makes of the gradient of these rows: summed into the memory's places."""
        signed = jnp.where(self._negative_rows(seed, row, d.shape[0]), -d, d)
        zeros = jnp.zeros((self.size // self.unit, self.unit), d.dtype)
        return zeros.at[self._pieces(seed, row, d.shape[0])].add(signed.reshape(-1, self.unit)).reshape(-1)

    def _pieces(self, seed: Array, row: Any, count: int) -> Array:
        in_row = self.shape[1] // self.unit
        piece = jnp.asarray(row, jnp.int32) * in_row + jnp.arange(count * in_row, dtype=jnp.int32)
        return lax.div(self.place(seed, piece * self.unit), jnp.full(piece.shape, self.unit, jnp.int32))

    def _negative_rows(self, seed: Array, row: Any, count: int) -> Array:
        shape = (count, self.shape[1])
        element = lax.broadcasted_iota(jnp.int32, shape, 0) + jnp.asarray(row, jnp.int32)
        return self.negative(sign_key(seed), element * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1))


def materialise(
    memory: Float[Array, "M"],
    seed: ArrayLike,
    shape: tuple[int, int],
    *,
    offset: int = 0,
    scale: ArrayLike = 1.0,
    align: int = 128,
) -> Float[Array, "k n"]:
    """The weight that `hashed_matmul` multiplies with, as a dense array in the memory's dtype.

    Args, errors: as `hashed_matmul`.

    Example:
      >>> import jax.numpy as jnp
      >>> w = materialise(jnp.arange(4.0), 7, (2, 4), align=1)
      >>> jnp.sort(jnp.abs(w), axis=1)
      Array([[0., 1., 2., 3.],
             [0., 1., 2., 3.]], dtype=float32)
    """
    fold = Fold(memory.size, (shape[0], shape[1]), offset, align)
    scaled = memory.astype(wide(memory.dtype)) * jnp.asarray(scale, wide(memory.dtype))
    return fold.rows(scaled.astype(memory.dtype), as_seed(seed), 0, shape[0])


def as_seed(seed: ArrayLike) -> UInt32[Array, ""]:
    """A seed as 32 bits.

    Raises:
      KernelError: no single integer, or a number outside 0..2³² - 1.
    """
    if isinstance(seed, int):
        if not 0 <= seed < 2**32:
            raise KernelError(f"seed {seed}: expected 0 to 2³² - 1")
        return jnp.uint32(seed)
    found = jnp.asarray(seed)
    if found.shape or not jnp.issubdtype(found.dtype, jnp.integer):
        raise KernelError(f"a seed of shape {found.shape} and {found.dtype}: expected one integer")
    return found.astype(jnp.uint32)


def sign_key(seed: UInt32[Array, ""]) -> UInt32[Array, ""]:
    return mix(seed ^ jnp.uint32(0x85EBCA6B))


def mix(x: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """32 bits from 32 bits, one to one."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ lax.shift_right_logical(x, jnp.full(x.shape, shift, jnp.uint32))) * jnp.uint32(factor)
    return x ^ lax.shift_right_logical(x, jnp.full(x.shape, 16, jnp.uint32))
