"""How the text of an option becomes a value. Whatever can be checked without a model is checked while parsing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter, validators

from whence.errors import ConfigError

if TYPE_CHECKING:
    from cyclopts import Token

    from whence.curvature.basis import Damping
    from whence.curvature.response import Unrolled


def _whole(at_least: int) -> Callable[[Any, Sequence[Token]], int]:
    """Return a converter for whole numbers. The parser's own reads 1.5 as 2."""

    def convert(type_: Any, tokens: Sequence[Token]) -> int:
        text = tokens[0].value.strip()
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number; give {at_least} or more.") from None
        if number < at_least:
            raise ValueError(f"{number} is too small; give {at_least} or more.")
        return number

    return convert


def _size(type_: Any, tokens: Sequence[Token]) -> int | str:
    """Convert a batch size: `auto` or a whole number."""
    return "auto" if tokens[0].value.strip() == "auto" else _whole(1)(type_, tokens)


def _fraction(type_: Any, tokens: Sequence[Token]) -> float:
    """Convert a share above 0 and up to 1: `0.02` or `1/64`."""
    text = tokens[0].value.strip()
    over, slash, under = text.partition("/")
    try:
        number = float(over) / float(under) if slash else float(over)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is no share; give a number above 0 and up to 1, such as 0.02 or 1/64.") from None
    if not 0 < number <= 1:
        raise ValueError(f"{text} is no share; give a number above 0 and up to 1, such as 0.02 or 1/64.")
    return number


def _split(type_: Any, tokens: Sequence[Token]) -> list[str]:
    """Split `a,b` into its parts; a YAML list and a repeated option come as several tokens."""
    parts = [part.strip() for token in tokens for part in token.value.split(",")]
    if not all(parts):
        raise ValueError(f"{','.join(parts)!r} has an empty part; separate names by single commas.")
    return parts


def _split_whole(type_: Any, tokens: Sequence[Token]) -> list[int]:
    """Split `0,3,7` into whole numbers that are not negative."""
    parts = _split(type_, tokens)
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{','.join(parts)!r} is no list of row numbers; write for example 0,3,7.")
    return [int(part) for part in parts]


Count = Annotated[int, Parameter(converter=_whole(1), n_tokens=1)]
Size = Annotated[int | Literal["auto"], Parameter(converter=_size, n_tokens=1)]
Whole = Annotated[int, Parameter(converter=_whole(0), n_tokens=1)]
Switch = Annotated[bool, Parameter(negative=())]
Names = Annotated[list[str], Parameter(converter=_split, n_tokens=1, negative=())]
Numbers = Annotated[list[int], Parameter(converter=_split_whole, n_tokens=1, negative=())]
Texts = Annotated[list[str], Parameter(negative=())]
Fraction = Annotated[float, Parameter(converter=_fraction, n_tokens=1)]
Share = Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))]


def parse_response(text: str) -> Literal["inverse", "unrolled"] | Unrolled:
    """Return what `--response` means: `inverse`, `unrolled`, or `unrolled:TIME`.

    Raises:
        ConfigError: the text is none of these.
    """
    if text in ("inverse", "unrolled"):
        return cast(Literal["inverse", "unrolled"], text)
    kind, _, number = text.partition(":")
    try:
        time = float(number)
    except ValueError:
        time = math.nan
    if kind != "unrolled" or not (math.isfinite(time) and time > 0):
        raise ConfigError(
            f"--response {text} is not understood. Give inverse, unrolled (the length of training must be known), "
            "or unrolled:1.5 (1.5 = the sum of the learning rates over all steps)."
        )
    from whence.curvature.response import Unrolled

    return Unrolled(time=time)


def parse_damping(text: str) -> float | Literal["auto", "calibrated"] | Damping:
    """Return what `--damping` means: a number (absolute), `auto`, `calibrated`, `relative:0.1` or `relative:0.1:model`.

    Raises:
        ConfigError: the text is none of these.
    """
    if text in ("auto", "calibrated"):
        return cast(Literal["auto", "calibrated"], text)
    kind, _, rest = text.partition(":")
    number, _, scope = rest.partition(":") if kind == "relative" else (text, "", "")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0) or scope not in ("", "layer", "model"):
        raise ConfigError(
            f"--damping {text} is not understood. Give a number of at least 0 (absolute), auto, calibrated, "
            "relative:0.1 (of each layer's mean eigenvalue) or relative:0.1:model (of the mean over all layers)."
        )
    if kind != "relative":
        return value
    from whence.curvature.basis import Damping

    return Damping(relative=value, scope=cast(Literal["layer", "model"], scope or "layer"))
