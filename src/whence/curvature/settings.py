"""Damping and response as the user gives them, resolved to what the curvature is weighed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from whence.curvature.basis import Damping, resolve_damping
from whence.curvature.response import Response, Unrolled
from whence.errors import ConfigError

SolverName = Literal["direct", "cg", "exact"]
DampingLike = float | Damping | Literal["auto", "calibrated"]
ResponseLike = Unrolled | Literal["inverse", "unrolled"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What eigenvalues are weighed with; `scale` turns removal effects into measured ones, where that is known."""

    damping: float | Damping
    response: Response = "inverse"
    scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for a manifest."""
        values: dict[str, Any] = {"damping": self.damping if isinstance(self.damping, float) else vars(self.damping)}
        if isinstance(self.response, Unrolled):
            values["response"] = {"unrolled": vars(self.response)}
        return values | ({"scale": self.scale} if self.scale != 1 else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spectrum:
        """Return what `to_json` wrote."""
        damping, response = values["damping"], values.get("response")
        return cls(
            damping=Damping(**damping) if isinstance(damping, Mapping) else float(damping),
            response=Unrolled(**response["unrolled"]) if response else "inverse",
            scale=float(values.get("scale", 1.0)),
        )


def resolve(damping: DampingLike, response: ResponseLike, *, calibration: Spectrum | None, training_time: float | None) -> Spectrum:
    """Return what damping and response mean.

    Args:
        damping: a number, `Damping`, `"calibrated"`, or `"auto"`: a tenth of each layer's mean eigenvalue for the inverse,
            none for a finite run, which needs none.
        response: `"inverse"`, `Unrolled`, or `"unrolled"`: of the length that is known from training.
        calibration: what was found on retrained subsets, if anything.
        training_time: sum of the learning rates, if known.

    Raises:
        ConfigError: a value cannot be used, or needs what is not known.
    """
    if damping == "calibrated":
        if calibration is None:
            raise ConfigError(
                "damping='calibrated' needs a calibration, and this run folder has none for the strategy. "
                "Call attributor.calibrate(queries, train, bank) with a bank of retrained subsets first."
            )
        if response not in ("inverse", calibration.response):
            raise ConfigError(f"damping='calibrated' brings its own response, and response={response!r} was given too; leave one out.")
        return calibration
    if response == "unrolled":
        if training_time is None:
            raise ConfigError(
                "response='unrolled' needs the length of training, which is not known here. "
                "Give it: response=whence.Unrolled(time=sum of the learning rates over all steps)."
            )
        response = Unrolled(time=training_time)
    if response != "inverse" and not isinstance(response, Unrolled):
        raise ConfigError(f"response={response!r} is not known; choose 'inverse', 'unrolled' or whence.Unrolled(time=...).")
    if isinstance(response, Unrolled) and damping == "auto":
        return Spectrum(damping=0.0, response=response)
    return Spectrum(damping=resolve_damping(damping), response=response)
