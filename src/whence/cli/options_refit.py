"""The options of the verbs that estimate fine-tunes to first order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whence.cli.options import KeepOptions
from whence.cli.values import Count, Switch, Texts, Whole
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.evidence.calibrating import EstimateSettings
    from whence.evidence.estimating import SubsetSettings
    from whence.evidence.first_order import GradientSettings
    from whence.refit.limits import Constraints
    from whence.refit.select import SelectOptions


@dataclass(kw_only=True)
class GradientOptions:
    """How outputs and gradients are measured."""

    projection: Literal["pca", "random", "none"] = "pca"
    """pca: leading directions of the training rows' gradients; random: sparse random signs; none: every parameter, for small models."""

    dimension: Count = 400
    """Numbers kept of a gradient; none keeps all."""

    per_token: Switch = False
    """A row for each trained token instead of one for each example: the loss is exact, rows and time are as many times more."""

    by: str = "column"
    """What training rows are grouped by: column (the recipe's groups: source, task, skill), row, or cluster:N for clusters of gradients."""

    def settings(self, run: KeepOptions) -> GradientSettings:
        """Return the options as the library takes them, checked."""
        from whence.evidence.first_order import GradientSettings

        if run.adam:
            raise ConfigError("--adam scales the gradients of scores; estimates take gradients as they are. Leave it out.")
        return GradientSettings(**vars(self), seed=run.seed)


@dataclass(kw_only=True)
class SubsetOptions:
    """Which subsets are estimated."""

    subsets: Count | None = None
    """How many subsets are drawn. Default: 1000."""

    share: float | None = None
    """Share of the groups, or of the rows, in each. Default: 0.5."""

    design: Literal["groups", "rows", "bernoulli", "leave-one-out"] | None = None
    """groups (the default): that share of the groups; rows: groups up to that share of the rows; bernoulli: each group with that
    probability; leave-one-out: all groups but one, each in turn."""

    subsets_file: Path | None = None
    """Subsets from a file instead: JSON, a list of lists of groups, or a subset per line, its groups separated by commas or tabs."""

    def settings(self, seed: int) -> SubsetSettings:
        """Return the options as the library takes them, checked."""
        from whence.evidence.estimating import SubsetSettings

        given: dict[str, Any] = {"count": self.subsets, "share": self.share, "design": self.design}
        named = {name: value for name, value in given.items() if value is not None}
        if self.subsets_file is not None and named:
            raise ConfigError("--subsets-file says which subsets there are; leave --subsets, --share and --design out.")
        if self.design == "leave-one-out" and len(named) > 1:
            raise ConfigError("--design leave-one-out leaves each group out once; leave --subsets and --share out.")
        return SubsetSettings(**named, file=self.subsets_file, seed=seed)


@dataclass(kw_only=True)
class RealOptions:
    """How real fine-tunes set estimates right and judge them."""

    metric: str = "loss"
    """What the ridge is chosen by, and the summary is about: loss, accuracy or probability (of options), or one of them of a group of
    queries, such as loss/GROUP (estimate only)."""

    ridge: float | None = None
    """Strength of the pull to the model as it is, instead of the one that calibration chooses."""

    calibration: Whole = 6
    """Real fine-tunes, on random subsets, that choose the ridge and the shift between estimate and metric; 0: none, and then --ridge."""

    held_out: Whole = 0
    """Further real fine-tunes that only judge: the trust report. 0: none."""

    def given(self) -> dict[str, Any]:
        """Return the options of this class as the library takes them."""
        return {name: getattr(self, name) for name in RealOptions.__dataclass_fields__}


@dataclass(kw_only=True)
class EstimateOptions(RealOptions):
    """How subsets are estimated."""

    method: Literal["refit", "influence", "gradient", "gradex"] = "refit"
    """refit: until converged; influence: one Newton step (TRAK); gradient: products of gradients; gradex: the published recipe."""

    scale: float | None = None
    """With --method gradex: length of its move over that of the trained weights. Default: 0.4."""

    def settings(self, repeats: int) -> EstimateSettings:
        """Return the options as the library takes them, checked."""
        from whence.evidence.calibrating import EstimateSettings

        if self.scale is not None and self.method != "gradex":
            raise ConfigError(f"--scale is for --method gradex; {self.method} moves as far as its ridge allows. Leave it out.")
        scale: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
        return EstimateSettings(**self.given(), **scale, method=self.method, repeats=repeats)


@dataclass(kw_only=True)
class SelectionOptions(RealOptions):
    """Which groups are chosen, and within which limits."""

    method: Literal["forward", "backward", "ensemble", "ridge", "lasso", "influence"] = "forward"
    """forward, backward: a group at a time; ensemble: the best groups by the mean of random subsets with them; ridge, lasso: groups with a
    positive coefficient in a linear datamodel; influence: groups that help to first order."""

    until: Literal["gain", "budget", "best"] | None = None
    """Of forward and backward. gain (the default): until no group betters the metric; budget: as far as limits allow; best: to the end,
    then the best on the way."""

    subsets: Count | None = None
    """Random subsets of ensemble, ridge and lasso. Default: 1000."""

    share: float = 0.5
    """Share of the groups in a random subset, also in those of real fine-tunes."""

    examples: Count | None = None
    """Choose at most so many examples."""

    tokens: Count | None = None
    """Choose at most so many trained tokens."""

    minimum: Texts = field(default_factory=list)
    """At least so many examples of a class or group, CLASS=N; given once or more."""

    most_alike: float | None = None
    """Two chosen groups have mean gradients with at most this cosine."""

    def settings(self, repeats: int) -> EstimateSettings:
        """Return what is about estimates as the library takes it, checked."""
        from whence.evidence.calibrating import EstimateSettings

        return EstimateSettings(**self.given(), repeats=repeats)

    def how(self, seed: int) -> SelectOptions:
        """Return what is about the choice as the library takes it, checked."""
        from whence.refit.select import SelectOptions

        if self.until is not None and self.method not in ("forward", "backward"):
            raise ConfigError(f"--until is for --method forward and backward; {self.method} does not go step by step. Leave it out.")
        if self.subsets is not None and self.method not in ("ensemble", "ridge", "lasso"):
            raise ConfigError(f"--subsets is for --method ensemble, ridge and lasso; {self.method} draws none. Leave it out.")
        if not 0 < self.share < 1:
            raise ConfigError(f"--share {self.share}: give a share between 0 and 1.")
        named = {name: value for name in ("until", "subsets") if (value := getattr(self, name)) is not None}
        return SelectOptions(method=self.method, share=self.share, seed=seed, **named)

    def constraints(self) -> Constraints:
        """Return the limits as the library takes them, checked."""
        from whence.refit.limits import Constraints

        minimum = dict(_minimum(text) for text in self.minimum)
        return Constraints(examples=self.examples, tokens=self.tokens, minimum=minimum, most_alike=self.most_alike)


def _minimum(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.strip().isdecimal():
        raise ConfigError(f"--minimum {text}: give CLASS=N, for example praise=20.")
    return name, int(number)
