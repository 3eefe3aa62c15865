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

__all__ = [
    "Schedule",
    "cosine",
    "ddim",
    "ddpm",
    "drop_labels",
    "epsilon_loss",
    "guided",
    "linear",
    "posterior",
    "predict_noise",
    "predict_start",
    "q_sample",
    "schedule",
]
