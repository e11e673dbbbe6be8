"""The learning rate as a function of the iteration."""

from __future__ import annotations

from math import cos, pi

from coverfast.training.settings import TrainingSettings


def learning_rate(s: TrainingSettings, iteration: int) -> float:
    """Of `iteration`, from 1: a linear warm-up, then constant or a half cosine over what is left of the schedule."""
    if iteration < s.warmup:
        return s.lr * iteration / s.warmup
    if s.schedule == "constant":
        return s.lr
    length = (s.schedule_iterations or s.iterations) - s.warmup
    done = min(1.0, max(0, iteration - 1 - s.warmup) / max(1, length))
    return s.lr * (1 + cos(pi * done)) / 2
