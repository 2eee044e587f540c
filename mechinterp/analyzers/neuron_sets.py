"""Sets of MLP neurons that are switched off together, beside random ones."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mechinterp.core.analyzer import Writes
from mechinterp.core.interventions import Intervention
from mechinterp.sites import Site

Array = npt.NDArray[np.floating]
Numbers = npt.NDArray[np.integer]

RANDOM = 5
"""Random sets of neurons for each size of the control."""


def switched_off(
    chosen: Numbers, layers: Sequence[int], neurons: int, write: Writes, kind: str = "mlp_act"
) -> tuple[Intervention, ...]:
    """What overwrites a set of neurons: one write for each layer that some lie in.

    Args:
        chosen: numbers of the neurons, counted through all of `layers`.
        layers: the layers that have them, each with so many `neurons`.
        write: makes the intervention at a site, such as `Zero`.
    """
    place, neuron = np.divmod(chosen, neurons)
    return tuple(
        write(Site(kind, layers[i], neurons=tuple(sorted(neuron[place == i].tolist())))) for i in np.unique(place)
    )


def alike(chosen: Numbers, neurons: int, rng: np.random.Generator) -> Numbers:
    """As many random neurons of the same layers, all of which are as likely: chosen ones are drawn again at times.

    Only so is a random set one more draw (`rank_p`).
    """
    layers, counts = np.unique(chosen // neurons, return_counts=True)
    return np.concatenate(
        [layer * neurons + rng.permutation(neurons)[:count] for layer, count in zip(layers, counts, strict=True)]
    )


def by_set(rows: Array, sizes: Sequence[int]) -> Array:
    """``example row`` as ``example set size``: the ranked sets first, then those of each random draw.

    Rows are the ranked set of each size, then all sizes of each random draw.
    """
    return rows.reshape(len(rows), -1, len(sizes))


def curves(rows: Array, sizes: Sequence[int]) -> Array:
    """``example row`` as ``example order size``: the ranked sets, and the mean of the random ones."""
    each = by_set(rows, sizes)
    return np.stack([each[:, 0], each[:, 1:].mean(1)], 1)
