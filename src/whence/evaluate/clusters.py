"""Groups of rows that are alike, where the data name none: clusters of their embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.errors import ConfigError


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
    different = len(embeddings.unique(dim=0))
    if not 2 <= clusters <= different:
        raise ConfigError(f"{clusters} clusters of {different} different embeddings cannot be made; give 2 to {different}.")
    from sklearn.cluster import KMeans

    points = embeddings.double().numpy()
    found = KMeans(clusters, n_init=4, random_state=seed).fit(points)
    distances, labels = torch.from_numpy(found.transform(points)), torch.from_numpy(found.labels_).long()
    order = labels.bincount(minlength=clusters).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(clusters)
    return Clusters(numbers=places[labels], central=tuple(distances.argmin(0)[order].tolist()))
