"""Diffusion and its physics: what turns noise into examples, and what trains it."""

from jaxpeft.generate.ddpm import (
    Schedule,
    cosine,
    ddim,
    ddpm,
    drop_labels,
    epsilon_loss,
    guided,
    linear,
    posterior,
    predict_noise,
    predict_start,
    q_sample,
    schedule,
)
from jaxpeft.generate.quality import extraction, frechet, mifid, nearest_distance, tile_distance

__all__ = [
    "Schedule",
    "cosine",
    "ddim",
    "ddpm",
    "drop_labels",
    "epsilon_loss",
    "extraction",
    "frechet",
    "guided",
    "linear",
    "mifid",
    "nearest_distance",
    "posterior",
    "predict_noise",
    "predict_start",
    "q_sample",
    "schedule",
    "tile_distance",
]
