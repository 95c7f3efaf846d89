"""cleanlab 2.9.0: how suspicious each label is, from probabilities of models that did not see the row.

Confident learning compares every label with out-of-sample probabilities (C. Northcutt, L. Jiang and I. Chuang, "Confident
Learning: Estimating Uncertainty in Dataset Labels", 2021). Needs only numpy, scikit-learn and cleanlab; neither torch nor
whence is imported here, so that it also runs in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FitPredict = Callable[[Sequence[int], Sequence[int]], ArrayLike]
"""Trains on the first rows and returns probabilities `[row, class]` of the second ones."""


def cross_validated_probabilities(fit_predict: FitPredict, labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> NDArray[np.float64]:
    """Return probabilities `[row, class]`, each row's from a model trained on the other folds; folds keep the shares of the classes."""
    from sklearn.model_selection import StratifiedKFold

    given = np.asarray(labels)
    found: NDArray[np.float64] | None = None
    for train, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(given, given):
        part = np.asarray(fit_predict(train.tolist(), held_out.tolist()), dtype=np.float64)
        if found is None:
            found = np.full((len(given), part.shape[1]), np.nan)
        found[held_out] = part
    assert found is not None
    assert np.isfinite(found).all()
    return found


def label_quality_scores(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return `1 - cleanlab's label quality` `[row]`, high for labels that look wrong.

    The quality is the probability of the given label (`self_confidence`, cleanlab's default), so the order is that of the
    cross-validated loss.
    """
    from cleanlab.rank import get_label_quality_scores

    return 1 - get_label_quality_scores(np.asarray(labels), np.asarray(probabilities, dtype=np.float64))


def confident_learning_scores(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return scores `[row]`, high for labels that look wrong: rows that confident learning flags come first, from 1 to 2.

    Within the flagged rows and within the others the order is by `label_quality_scores`. This is the list that a user of
    `find_label_issues` reads from the top, continued to all rows. Flags are cleanlab's default, `prune_by_noise_rate`:
    as many of each pair of classes as the estimated joint distribution of given and true labels says are wrong.
    """
    from cleanlab.filter import find_label_issues

    given, estimated = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    flagged = find_label_issues(given, estimated, n_jobs=1)
    return label_quality_scores(estimated, given) + flagged
