"""LIME and Shapley values of tokens, by captum and shap, from the values of masked inputs."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mechinterp.errors import NeedsError

Masks: TypeAlias = npt.NDArray[np.bool_]
"""``input token``, True where a token is kept."""
Floats: TypeAlias = npt.NDArray[np.floating]

PACKAGES = {"lime": "captum", "kernel-shap": "captum", "partition-shap": "shap"}
TOGETHER = 64
"""Masked inputs that shap asks for at once, at most."""


def check_package(method: str) -> None:
    """Raise where the package that a method takes is not installed.

    Raises:
        NeedsError: with the command that installs it.
    """
    if importlib.util.find_spec(PACKAGES[method]) is None:
        raise NeedsError(
            f"{method} takes the package {PACKAGES[method]}, which is not installed; run: pip install"
            " 'mechinterp[attribution]'"
        )


@dataclass(frozen=True)
class Game:
    """Tokens that are kept or masked, and what that is worth.

    Attributes:
        value: of masked inputs.
        tokens: as text, of which shap's tree is made.
        evaluations: masked inputs.
        seed: of which of them are drawn.
    """

    value: Callable[[Masks], Floats]
    tokens: Sequence[str]
    evaluations: int
    seed: int

    def attribute(self, method: str) -> Floats:
        """One number for each token."""
        if len(self.tokens) == 1:  # one player gets it all, whoever divides it
            ends = self.value(np.array([[True], [False]]))
            return ends[:1] - ends[1:]
        return self._by_trees() if method == "partition-shap" else self._by_regression(method)

    def _by_regression(self, method: str) -> Floats:
        from captum.attr import KernelShap, Lime

        def forward(kept: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.value(kept.numpy() > 0.5))

        explainer = (Lime if method == "lime" else KernelShap)(forward)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a lasso that is done with few inputs
            torch.manual_seed(self.seed)
            found = explainer.attribute(
                torch.ones(1, len(self.tokens)),
                n_samples=self.evaluations,
                perturbations_per_eval=self.evaluations,
                return_input_shape=False,
            )
        return found.reshape(-1).numpy()

    def _by_trees(self) -> Floats:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about colours, while it is imported
            import shap

        n = len(self.tokens)
        masker = _Masker(list(self.tokens))
        explainer: Any = shap.explainers.Partition(lambda kept: self.value(kept > 0.5), masker)
        found = explainer(np.ones((1, n)), max_evals=self.evaluations, batch_size=TOGETHER, silent=True)
        return np.asarray(found.values)[0].reshape(-1)


class _Masker:
    """What shap is told of the tokens: that a masked input is its mask, and the tree of those that belong together."""

    def __init__(self, tokens: list[str]) -> None:
        from shap.maskers._text import partition_tree

        self.tokens = tokens
        self.clustering = partition_tree(tokens, [])
        self.shape = (1, len(tokens))

    def __call__(self, kept: Masks, _: Any) -> tuple[npt.NDArray[np.floating]]:
        return (kept.reshape(1, -1).astype(float),)
