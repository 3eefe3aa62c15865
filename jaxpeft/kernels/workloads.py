"""Products and attentions of real layers, as data: what the kernels are compiled for, measured and tuned on."""

from typing import NamedTuple

__all__ = [
    "ATTENTION",
    "DECODING",
    "GROUPED",
    "HASHED",
    "PRODUCTS",
    "Attention",
    "Decoding",
    "Grouped",
    "Hashed",
    "Product",
]


class Product(NamedTuple):
    """`x (m, k)` times `w (k, n)` with an update of rank r."""

    name: str
    m: int
    k: int
    n: int
    r: int


class Grouped(NamedTuple):
    """A product whose b examples of t rows have updates of their own, out of so many groups."""

    name: str
    b: int
    t: int
    k: int
    n: int
    r: int
    groups: int


class Hashed(NamedTuple):
    """`x (m, k)` times a weight (k, n) that is read from so many elements of memory."""

    name: str
    m: int
    k: int
    n: int
    size: int


class Attention(NamedTuple):
    """Queries (b, t, heads, head_dim) over keys (b, s, kv_heads, head_dim), with a prefix of so many positions."""

    name: str
    b: int
    t: int
    s: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    prefix: int


class Decoding(NamedTuple):
    """One token of each of b sequences over a quantised cache of c tokens."""

    name: str
    b: int
    heads: int
    kv_heads: int
    head_dim: int
    c: int


PRODUCTS = (
    Product("Llama-3-8B q, 2,048 tokens", 2048, 4096, 4096, 16),
    Product("Llama-3-8B k, 2,048 tokens", 2048, 4096, 1024, 16),
    Product("Llama-3-8B gate, 2,048 tokens", 2048, 4096, 14336, 16),
    Product("Llama-3-8B down, 2,048 tokens", 2048, 14336, 4096, 16),
    Product("Llama-3-8B q, 16 x 2,048 tokens", 32768, 4096, 4096, 16),
    Product("Llama-3-8B q, one token of 16 sequences", 16, 4096, 4096, 16),
    Product("Llama-3-8B q, rank 256", 2048, 4096, 4096, 256),
    Product("ViT-L q, 8 images", 8 * 197, 1024, 1024, 16),
    Product("ViT-L up, 8 images", 8 * 197, 1024, 4096, 16),
    Product("MiniLM q, 16 x 128 tokens", 2048, 384, 384, 8),
    Product("MiniLM up, 16 x 128 tokens", 2048, 384, 1536, 8),
)

GROUPED = (
    Grouped("Llama-3-8B q, 4 x 512 tokens", 4, 512, 4096, 4096, 16, 64),
    Grouped("Llama-3-8B gate, 4 x 512 tokens", 4, 512, 4096, 14336, 16, 8),
    Grouped("Llama-3-8B q, one token of 16 sequences, 1,024 groups", 16, 1, 4096, 4096, 16, 1024),
    Grouped("Llama-3-8B q, one token of 2,048 sequences", 2048, 1, 4096, 4096, 16, 64),
    Grouped("Llama-3-8B q, one token of 16 sequences, rank 256", 16, 1, 4096, 4096, 256, 8),
    Grouped("ViT-L q, 8 images", 8, 197, 1024, 1024, 16, 8),
    Grouped("MiniLM up, 16 x 128 tokens", 16, 128, 384, 1536, 8, 32),
)

HASHED = (
    Hashed("Llama-3-8B q, 2,048 tokens, a sixteenth", 2048, 4096, 4096, 2**20),
    Hashed("Llama-3-8B down, 2,048 tokens, a hundred and twelfth", 2048, 14336, 4096, 2**19),
    Hashed("Llama-3-8B q, one token of 16 sequences", 16, 4096, 4096, 2**20),
    Hashed("ViT-L up, 8 images, a fortieth", 8 * 197, 1024, 4096, 102400),
    Hashed("MiniLM up, 16 x 128 tokens, a tenth", 2048, 384, 1536, 58880),
)

ATTENTION = (
    Attention("Llama-3-8B, 2,048 tokens", 1, 2048, 2048, 32, 8, 128, True, 64),
    Attention("ViT-L, 8 images", 8, 197, 197, 16, 16, 64, False, 16),
    Attention("MiniLM, 16 x 128 tokens", 16, 128, 128, 12, 12, 32, False, 16),
)

DECODING = (
    Decoding("Llama-3-8B, 16 sequences of 4,096", 16, 32, 8, 128, 4096),
    Decoding("Llama-3-8B, one sequence of 32,768", 1, 32, 8, 128, 32768),
    Decoding("as many heads as keys', 16 sequences of 1,024", 16, 16, 16, 64, 1024),
)
