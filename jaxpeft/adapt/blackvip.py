"""BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning (Oh et al., CVPR 2023, arXiv:2303.14773).

The model is a service: images go in, answers come out, no gradient. What is learned is an image added to each input, drawn by
a small decoder (the coordinator) from a frozen public encoder's features; its ten thousand numbers are few enough for gradients
estimated from values (`tune.spsa`, and `tune.spsa_gc` for the steps).

    x~ = clip(x + eps h(x)),   h(x) = Decoder([Encoder(x); t])          t: a trained trigger, the same for all images
    decoder: (32, g, g), then for each stage twice the size: every channel to one or two by a 2 x 2 block, a product over
    channels, a norm, gelu; last to the image's channels by 2 x 2 blocks, without bias

Channels are 32 -> 64 -> 64, 64 -> 64 -> 32, 32 -> 32 -> 32, 32 -> 32 -> 16, 16 -> 3 for 224 x 224 images, as in the paper
(9,920 numbers with its trigger of 800); smaller images take fewer stages, the last ones.

    border_prompt: the baseline VP, a trained frame of `width` pixels, the same for all images

Reference code: changdaeoh/BlackVIP @66606fb (trainers/visual_prompters.py, trainers/blackvip.py). Departure: its batch norms,
whose running statistics every one of the 2 q evaluations moves, are norms over one image's groups of channels here: a pure
function with the same number of parameters.

Letters: b batch, s image side, c image channels, z features, g side of the first grid.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, register, site_key

__all__ = ["blackvip", "border_prompt", "coordinate", "coordinator", "pooled_pixels"]

Features = Callable[[Float[Array, "b s s c"]], Float[Array, "b z"]]
STAGES = ((64, 64), (64, 32), (32, 32), (32, 16))  # channels after the blocks and after the product
FIRST = 32


def pooled_pixels(x: Float[Array, "b s s c"], side: int = 4) -> Float[Array, "b side*side*c"]:
    """The plainest frozen encoder: averages over a grid of `side` x `side` cells, or the pixels of a smaller image."""
    b, s, _, c = x.shape
    side = min(side, s)
    return jax.image.resize(x, (b, side, side, c), "linear").reshape(b, -1)


def _stages(size: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The side of the first grid and the stages: as many doublings as the size allows, five at most."""
    doublings = 0
    while doublings < len(STAGES) + 1 and size % 2 ** (doublings + 1) == 0 and size // 2 ** (doublings + 1) >= 1:
        doublings += 1
    if doublings < 1:
        raise ValueError(f"images of side {size}: the coordinator doubles its grid, so the side must be even")
    return size // 2**doublings, STAGES[len(STAGES) + 1 - doublings :]


def coordinator(key: Key[Array, ""], size: int, channels: int, features: int, trigger: int | None = None) -> Delta:
    """The decoder's parameters for images (size, size, channels) and so many features.

    Args:
      trigger: numbers of t; None fills the first grid, with as many channels for it as the features need.

    Returns:
      {"trigger" (n,), "stages": {"0": {"up" (in, k, 2, 2), "up_bias", "mix" (k in, out), "scale", "shift"}, ...}, "last"
      (in, c, 2, 2)}, as torch's layers start: U(±1/sqrt(fan_in)), norms at one and zero, t ~ U(0, 0.1).

    Raises:
      ValueError: a side that is odd, or a trigger that does not fill whole channels.
    """
    grid, stages = _stages(size)
    first = STAGES[len(STAGES) - len(stages) - 1][1] if len(stages) < len(STAGES) else FIRST
    if trigger is None:
        first = max(first, -(-(features + 1) // grid**2))
        trigger = first * grid**2 - features
    if trigger < 1 or (features + trigger) % grid**2:
        raise ValueError(f"{features} features and a trigger of {trigger} do not fill channels of {grid} x {grid}")
    first = (features + trigger) // grid**2

    def uniform(label: str, shape: tuple[int, ...], fan: int) -> Array:
        bound = fan**-0.5
        return jax.random.uniform(site_key(key, label), shape, minval=-bound, maxval=bound)

    made: dict[str, Any] = {}
    inner = first
    for i, (wide, out) in enumerate(stages):
        wide = max(wide // inner, 1) * inner
        k = wide // inner
        made[str(i)] = {
            "up": uniform(f"{i}/up", (inner, k, 2, 2), k * 4),
            "up_bias": uniform(f"{i}/bias", (wide,), k * 4),
            "mix": uniform(f"{i}/mix", (wide, out), out),
            "scale": jnp.ones(out),
            "shift": jnp.zeros(out),
        }
        inner = out
    return {
        "trigger": jax.random.uniform(site_key(key, "trigger"), (trigger,), maxval=0.1),
        "stages": made,
        "last": uniform("last", (inner, channels, 2, 2), channels * 4),
    }


def _doubled(x: Float[Array, "b h w i"], w: Float[Array, "i k 2 2"], *, mixing: bool) -> Array:
    """Every pixel becomes a block of 2 x 2: channel by channel (i k channels out), or summed over channels (k out)."""
    b, h, width, _ = x.shape
    y = jnp.einsum("bhwi,ikpq->bhpwqk" if mixing else "bhwi,ikpq->bhpwqik", x, w.astype(x.dtype))
    return y.reshape(b, 2 * h, 2 * width, -1)


def coordinate(phi: Delta, features: Float[Array, "b z"], size: int, eps: float = 1e-5) -> Float[Array, "b s s c"]:
    """h: the image that the coordinator draws for each row of features."""
    grid, _ = _stages(size)
    b = features.shape[0]
    t = jnp.broadcast_to(phi["trigger"].astype(features.dtype), (b, *phi["trigger"].shape))
    x = jnp.concatenate([features, t], axis=1).reshape(b, -1, grid, grid)
    x = jnp.moveaxis(x, 1, -1)  # channels first when it was cut, as in the reference
    for i in range(len(phi["stages"])):
        p = phi["stages"][str(i)]
        x = _doubled(x, p["up"], mixing=False)
        x = x + p["up_bias"].astype(x.dtype).reshape(1, 1, 1, -1)
        x = x @ p["mix"].astype(x.dtype)
        groups = x.reshape(*x.shape[:3], -1, min(8, x.shape[-1]))
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        x = (centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + eps)).reshape(x.shape)
        x = x * p["scale"].astype(x.dtype).reshape(1, 1, 1, -1) + p["shift"].astype(x.dtype).reshape(1, 1, 1, -1)
        x = jax.nn.gelu(x, approximate=False)
    return _doubled(x, phi["last"], mixing=True)


def _on_images(name: str, init: Any, changed: Any, config: dict[str, Any]) -> Method:
    """A method that changes the images, the first input, before the model sees them."""

    def start(key: Key[Array, ""], call: Call) -> Delta:
        shape = jnp.shape(call.inputs[0]) if call.inputs else ()
        if len(shape) != 4 or shape[1] != shape[2]:
            raise ValueError(f"{name} is for square images (b, s, s, c); the first input has shape {shape}")
        return init(key, *shape[2:])

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        own = trees.unmark(delta)
        return lambda params, x, *inputs, **kwargs: apply_fn(params, changed(own, x), *inputs, **kwargs)

    return Method(name, start, wrap, None, config)


@register(
    family="adapt",
    paper="Oh et al., CVPR 2023",
    mechanism="inputs",
    mergeable=False,
    exact_start=False,
    rate=1e-3,
    reads="images",
)
def blackvip(
    eps: Any = 1.0,
    *,
    encoder: Features | str = "pixels",
    trigger: int | None = None,
    low: Any = -1.0,
    high: Any = 1.0,
    name: str = "blackvip",
) -> Method:
    """A prompt of the image's size, drawn for each image; see the module.

    Train it from values alone: `train.make_step(..., optimiser=tune.spsa_gc(...), gradient=tune.value_and_spsa(c, q))`; where
    the model has gradients, any optimiser does.

    Args:
      eps: how strongly the prompt is added; 0 is the model itself. May be traced.
      encoder: frozen features of the images: a function (b, s, s, c) -> (b, z), or "pixels", `pooled_pixels`. Files do not
        keep a function.
      trigger: numbers of the trigger; None fills the first grid.
      low, high: the range of valid pixels, numbers or one a channel.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is that of `coordinator`. It does not merge.

    Raises:
      ValueError: at `init`, inputs that are not square images of an even side, a trigger that does not fit; an encoder by a
        name that is not known.
    """
    if isinstance(encoder, str) and encoder not in ("pixels", "given"):
        raise ValueError(f"encoder {encoder!r}: expected 'pixels' or a function of images")

    def features(x: Array) -> Array:
        if encoder == "given":
            raise ValueError("this method was made from a file, which does not keep the encoder: give it")
        return jax.lax.stop_gradient((pooled_pixels if isinstance(encoder, str) else encoder)(x))

    def init(key: Key[Array, ""], size: int, channels: int) -> Delta:
        image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        return coordinator(key, size, channels, jax.eval_shape(features, image).shape[1], trigger)

    def changed(phi: Delta, x: Array) -> Array:
        prompt = coordinate(phi, features(x).astype(x.dtype), x.shape[1])
        bound = lambda v: jnp.asarray(v, x.dtype)
        return jnp.clip(x + bound(eps) * prompt, bound(low), bound(high))

    kind = encoder if isinstance(encoder, str) else "given"
    config = dict(method="blackvip", eps=eps, encoder=kind, trigger=trigger, low=low, high=high, name=name)
    return _on_images(name, init, changed, config)


@register(
    family="adapt",
    paper="Bahng et al., 2022",
    mechanism="inputs",
    mergeable=False,
    exact_start=False,
    rate=1e-2,
    reads="images",
)
def border_prompt(
    width: int = 2, *, std: float = 1.0, low: Any = None, high: Any = None, name: str = "border_prompt"
) -> Method:
    """Visual prompting: a trained frame added to every image (Exploring Visual Prompts, arXiv:2203.17274).

    Args:
      width: of the frame, in pixels, at most half of the image.
      std: of its start, N(0, std²).
      low, high: the range that the sum is cut to; None for no cut.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is {"frame" (n, c)}, the pixels of the frame row by row. It does not merge.

    Raises:
      ValueError: at `init`, inputs that are not square images, or a frame wider than half of them.
    """
    if width < 1:
        raise ValueError(f"width {width}: a frame is at least one pixel wide")

    def inside(size: int) -> Any:
        rows = jnp.arange(size)
        edge = (rows < width) | (rows >= size - width)
        return edge[:, None] | edge[None]

    def count(size: int) -> int:
        return size**2 - max(size - 2 * width, 0) ** 2

    def init(key: Key[Array, ""], size: int, channels: int) -> Delta:
        if 2 * width > size:
            raise ValueError(f"width {width}: the images are {size} pixels wide, a frame at most half of that")
        return {"frame": std * jax.random.normal(key, (count(size), channels))}

    def changed(own: Delta, x: Array) -> Array:
        size = x.shape[1]
        edge = inside(size)
        place = jnp.cumsum(edge.reshape(-1)) - 1
        full = jnp.where(edge[..., None], own["frame"][place].reshape(size, size, -1), 0.0).astype(x.dtype)
        y = x + full[None]
        return y if low is None and high is None else jnp.clip(y, low, high)

    return _on_images(
        name, init, changed, dict(method="border_prompt", width=width, std=std, low=low, high=high, name=name)
    )
