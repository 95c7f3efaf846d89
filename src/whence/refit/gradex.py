"""The published estimator as its code has it, kept for comparison: `method="gradex"`.

D. Li et al., "Scalable Fine-tuning from Multiple Data Sources: A First-Order Approximation Approach" (2024). What the published
code does for a subset, and this does too:

- outputs at the start are dropped: every example counts as undecided;
- labels are drawn at random, 1 with probability 0.7; the gradients of examples labelled 0 change their sign. Both together give
  each example the same loss, whatever its label, but for the intercept, which the unequal labels move;
- scikit-learn's logistic regression (liblinear, L2 with C = 1e-4, an intercept) gives the direction. With so small a C it is
  nearly the mean gradient;
- it is carried back through the projection, `P w`, and scaled to a fixed length: `scale` times the norm of the adapter's weights.

Subset size, amount of training and convergence thus leave no trace but in the direction. The published code then writes `P w` into
the weights and measures the model. In k dimensions of many, nearly all of `P w` is noise of the projection; to first order it does
not matter, since the inner product of a gradient with `P w` is exactly that of the projected gradient with `w`. Arrays know no
model, so what is given here is the direction, the scaled `w`, and the first-order outputs `f0 + Z w` by way of `predict`: the
published recipe without what its noise does beyond first order.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.linear import Linearised


@dataclass(frozen=True, kw_only=True)
class GradexOptions:
    """The published recipe.

    Attributes:
        weight_norm: norm of the adapter's weights at the start, or of whatever is fine-tuned.
        parameters: how many weights gradients were projected from. A random projection of k rows that keeps lengths on average has
            `|P w|^2 = parameters / k |w|^2` on average, which is what is taken for the length of `P w`.
        directions: how many random rows were drawn, where the k dimensions are an orthonormal basis of fewer among them
            (`projection="pca"`); it stands for k in the length. None: k.
        scale: length of the move over `weight_norm`; published values go from 0.02 to 0.5, set by hand.
        inverse_ridge: scikit-learn's C.
        seed: of the random labels; every subset goes on with the same stream.
        positive: probability of label 1.
    """

    weight_norm: float
    parameters: int
    directions: int | None = None
    scale: float = 0.4
    inverse_ridge: float = 1e-4
    seed: int = 0
    positive: float = 0.7

    def __post_init__(self) -> None:
        for name in ("weight_norm", "parameters", "scale", "inverse_ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)!r}: give a number above 0.")
        if self.directions is not None and self.directions < 1:
            raise ConfigError(f"directions={self.directions!r}: give 1 or more, or None.")
        if not 0 < self.positive < 1:
            raise ConfigError(f"positive={self.positive!r}: give a probability between 0 and 1.")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def gradex_directions(linear: Linearised, members: Tensor, options: GradexOptions) -> Tensor:
    """Return the coefficients of the published logistic regression, unscaled, float64 `[subset, k]`.

    Args:
        linear: training rows; an example's gradient is the mean over its tokens. `outputs` are not looked at.
        members: bool `[subset, example]`.
        options: the recipe.

    Raises:
        DataError: sizes do not fit; or a subset has drawn one label only, as small ones do: the published code fails there too.
    """
    from sklearn.linear_model import LogisticRegression

    if members.dtype != torch.bool or members.dim() != 2 or members.shape[1] != linear.examples:
        raise DataError(f"members is {members.dtype} {tuple(members.shape)}; give bool [subset, example] of {linear.examples}.")
    gradients = linear.example_sums(linear.gradients.double().T).T.cpu()
    generator = torch.Generator().manual_seed(options.seed)
    found = torch.zeros(len(members), linear.dimensions, dtype=torch.float64)
    for number, own in enumerate(members.cpu()):
        labels = torch.rand(int(own.sum()), generator=generator) < options.positive
        if labels.all() or not labels.any():
            raise DataError(
                f"subset {number} has {len(labels)} examples, and all drew the same random label, so that the published recipe "
                "cannot be fit; give larger subsets or another seed."
            )
        signed = torch.where(labels[:, None], gradients[own], -gradients[own])
        fit = LogisticRegression(C=options.inverse_ridge, solver="liblinear", random_state=0)
        found[number] = torch.from_numpy(fit.fit(signed.numpy(), labels.numpy()).coef_[0])
    return found


def gradex(linear: Linearised, members: Tensor, options: GradexOptions) -> Tensor:
    """Return `w` whose back-projection has the published length, float64 `[subset, k]`; give it to `predict`.

    Raises:
        DataError: as for `gradex_directions`.
    """
    directions = gradex_directions(linear, members, options)
    lengths = directions.norm(dim=1, keepdim=True) * math.sqrt(options.parameters / (options.directions or linear.dimensions))
    return directions * (options.scale * options.weight_norm / torch.where(lengths > 0, lengths, 1.0))
