"""How many runs are computed at once: what fits in memory, found from compiled programs before anything runs."""

from collections.abc import Callable


class MemoryLimitError(ValueError):
    """Not even one run at a time fits."""


def chunk_size(count: int, limit: int, bytes_of: Callable[[int], int]) -> int:
    """The size of equal chunks of `count` runs, as few of them as fit in `limit` bytes each.

    Memory is nearly affine in the size: base, batch and states, and the temporaries of each run. So all runs at once are
    tried first; where they do not fit, one is, and the line through both names the size, which the third compile
    confirms. Where the line was wrong, the next one goes through the size that did not fit.

    Args:
      count: runs, 1 or more.
      limit: bytes.
      bytes_of: `(size) -> bytes` of the program that computes this many runs at once; every call compiles.

    Returns:
      A size for which `bytes_of` was called and is at most `limit`; `count` where all fit.

    Raises:
      MemoryLimitError: a single run is over the limit.
    """
    fails, most = count, bytes_of(count)
    if most <= limit:
        return count
    least = most if count == 1 else bytes_of(1)
    if least > limit:
        raise MemoryLimitError(
            f"one run at a time needs {least:,} bytes, the states of all included; the limit is {limit:,}: raise it, sweep "
            "fewer settings at once, or make a run smaller (rows of a batch, accumulate, remat, scan)"
        )
    while True:
        slope = max((most - least) / (fails - 1), 1.0)
        fits = min(max(1 + int((limit - least) / slope), 1), fails - 1)
        chunks = -(-count // fits)
        size = -(-count // chunks)  # the same number of chunks, none nearly empty
        if size == 1:
            return 1
        most = bytes_of(size)
        if most <= limit:
            return size
        fails = size


def cache_chunk(count: int) -> int:
    """The size of equal chunks of about four runs, which a CPU's caches hold better than all.

    Measured with 16 runs of an encoder of 2 layers and width 64 on two cores: 5 ms a run and step, instead of 7.
    """
    return -(-count // max(1, round(count / 4)))
