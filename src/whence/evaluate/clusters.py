"""Groups of rows that are alike, where the data name none: clusters of their embeddings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.errors import ConfigError

_ROWS = 2**14
"""Rows whose distances from all centres are looked at at a time."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Rows put into clusters, the largest first.

    Attributes:
        numbers: cluster of each row, int64 `[row]`.
        central: number of the row nearest to each cluster's centre, `[cluster]`.
    """

    numbers: Tensor
    central: tuple[int, ...]


def cluster_rows(embeddings: Tensor, clusters: int, *, seed: int = 0) -> Clusters:
    """Return clusters of embeddings `[row, feature]` by k-means: the best of four starts drawn with the seed.

    Raises:
        ConfigError: fewer than 2 clusters, or more than there are different rows.
    """
    if not 2 <= clusters <= len(embeddings):
        raise ConfigError(f"{clusters} clusters of {len(embeddings)} embeddings cannot be made; give 2 to {len(embeddings)}.")
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of too few different rows, which are counted below
        found = KMeans(clusters, n_init=4, random_state=seed).fit(embeddings.numpy())
    labels = torch.from_numpy(found.labels_).long()
    sizes = labels.bincount(minlength=clusters)
    if (different := int((sizes > 0).sum())) < clusters:
        raise ConfigError(
            f"{clusters} clusters of {different} different embeddings cannot be made; give {different} at most, and 2 at least."
        )
    order = sizes.argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(clusters)
    central = _nearest(embeddings, torch.from_numpy(found.cluster_centers_).to(embeddings))
    return Clusters(numbers=places[labels], central=tuple(central[order].tolist()))


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return the number of the row nearest to each centre, `[cluster]`; of equally near ones the first."""
    least = points.new_full((len(centres),), torch.inf)
    found = torch.zeros(len(centres), dtype=torch.int64)
    for first in range(0, len(points), _ROWS):
        distances, places = torch.cdist(points[first : first + _ROWS], centres).min(0)
        found = torch.where(distances < least, first + places, found)
        least = torch.minimum(distances, least)
    return found
