"""Weights of projections."""

from typing import Any

from torch import Tensor


def linear_weight(module: Any) -> Tensor:
    return module.weight
