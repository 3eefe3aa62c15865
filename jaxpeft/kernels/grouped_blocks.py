"""Blocks of the grouped low-rank product: their lengths, and how many examples a block of rows touches.

Shape letters: m rows, t of them an example, k inner, n outer, r rank.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxpeft.kernels.platforms import (
    LANES,
    VMEM_BYTES,
    KernelError,
    check_block,
    check_vmem,
    cut,
    power_of_two,
    sublanes,
    wide,
)

MAX_SLOTS = 32  # of a block of rows on TPU: each is two operands of the kernel
MAX_TABLE = 2**16  # entries that are read ahead on TPU, 12 bytes each of a memory of 1 MiB
WORK_A_BYTE = 128  # products that a TPU makes while a byte arrives: 93 (v5p) to 280 (v6e)
OPERAND = 2**15  # bytes that arrive while one is asked for: about 50 bundles of the static schedule on v5e


@dataclass(frozen=True)
class GroupedBlocks:
    """Lengths of a block of rows, inner and outer axis; `for_tpu` and `for_gpu` choose, `check_tpu` refuses."""

    m: int
    k: int
    n: int

    @classmethod
    def for_tpu(
        cls, m: int, k: int, n: int, r: int, t: int, dtype: Any, vmem_bytes: int = VMEM_BYTES
    ) -> "GroupedBlocks":
        """The blocks that wait least, for bytes or for the matrix unit, within `vmem_bytes` and `MAX_SLOTS`."""
        rows = {cut(m, want, sublanes(dtype)) for want in (8, 16, 32, 64, 128, 256, 512, 1024)}
        inner = {cut(k, want, LANES) for want in (128, 256, 512, 1024, 2048, k)}
        outer = {cut(n, want, LANES) for want in (128, 256, 512, 1024, 2048)}
        held = [i for i in rows if slots(m, i, t) <= MAX_SLOTS and pl.cdiv(m, i) * slots(m, i, t) <= MAX_TABLE]
        choices = [cls(i, j, o) for i in held for j in inner for o in outer]
        # The compiler needs room of its own: values that do not fit its registers.
        fitting = [c for c in choices if c.vmem(m, r, t, dtype) <= 5 * vmem_bytes // 8]
        if not fitting:
            raise KernelError(
                f"no blocks for ({m}, {k}) x ({k}, {n}) at rank {r}, {t} rows an example, fit {vmem_bytes} bytes of "
                f"VMEM and a table of {MAX_TABLE}: split the batch, or backend='xla'"
            )
        wait = lambda c: max(c.traffic(m, k, n, r, t, dtype), c.work(m, k, n, r, t) // WORK_A_BYTE)
        return min(fitting, key=lambda c: (wait(c) + c.steps(m, k, n, t), -c.m * c.k * c.n))

    @classmethod
    def for_gpu(cls, m: int, k: int, n: int, r: int) -> "GroupedBlocks":
        return cls(power_of_two(m, 16, 64 if r > 64 else 128), power_of_two(k, 16, 32), power_of_two(n, 16, 128))

    def check_tpu(self, m: int, k: int, n: int, r: int, t: int, dtype: Any, vmem_bytes: int) -> None:
        """Raises KernelError for blocks that Mosaic would refuse."""
        check_block("m", self.m, m, sublanes(dtype))
        check_block("k", self.k, k, LANES)
        check_block("n", self.n, n, LANES)
        if (count := slots(m, self.m, t)) > MAX_SLOTS:
            raise KernelError(
                f"a block of {self.m} rows touches {count} examples, at most {MAX_SLOTS} are held: fewer rows"
            )
        if pl.cdiv(m, self.m) * count > MAX_TABLE:
            raise KernelError(f"{m} rows of {t} an example: the table of their groups is too long; split the batch")
        check_vmem(self, self.vmem(m, r, t, dtype), vmem_bytes)

    def vmem(self, m: int, r: int, t: int, dtype: Any) -> int:
        """Bytes of VMEM: each block twice, so that the next is fetched meanwhile, the factors once more, the sums."""
        size, sums = jnp.dtype(dtype).itemsize, wide(dtype).itemsize
        factors = slots(m, self.m, t) * (pl.cdiv(r, sublanes(dtype)) * sublanes(dtype))
        across = pl.cdiv(factors, LANES) * LANES
        blocks = self.m * self.k + self.k * self.n + self.m * self.n + self.m * across
        return (
            2 * size * blocks
            + 3 * size * factors * (self.k + self.n)
            + sums * (2 * self.m * self.n + 2 * self.m * across)
        )

    def steps(self, m: int, k: int, n: int, t: int) -> int:
        """What the grid's steps cost, in bytes that arrive meanwhile: each begins by asking for every operand."""
        operands = 3 + 2 * slots(m, self.m, t)
        return pl.cdiv(m, self.m) * pl.cdiv(k, self.k) * pl.cdiv(n, self.n) * operands * OPERAND

    def work(self, m: int, k: int, n: int, r: int, t: int) -> int:
        """Products of the matrix unit, which takes weights of 128 by 128 and as long for fewer rows as for 128."""
        low = pl.cdiv(slots(m, self.m, t) * r, LANES) * LANES
        return pl.cdiv(m, self.m) * max(self.m, LANES) * (k * n + low * (k + n))

    def traffic(self, m: int, k: int, n: int, r: int, t: int, dtype: Any) -> int:
        """Bytes moved to and from memory."""
        rows, inner, outer = pl.cdiv(m, self.m), pl.cdiv(k, self.k), pl.cdiv(n, self.n)
        x = m * k * (1 if inner == 1 else outer)
        w = k * n * (1 if inner == outer == 1 else rows)
        factors = rows * slots(m, self.m, t) * r * (k + n)
        return (x + w + factors + m * n) * jnp.dtype(dtype).itemsize


def slots(m: int, block: int, t: int) -> int:
    """The most examples of t rows that a block of rows touches, blocks beginning at multiples of their length."""
    if not t % block:
        return 1
    most = block // t if not block % t else pl.cdiv(block - 1, t) + 1
    return min(most, m // t)
