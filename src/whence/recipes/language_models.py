"""What all families of language models share: no labels, and a small random model to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from whence.errors import ConfigError
from whence.recipes.family import TokenizerStyle
from whence.recipes.presets import language_model
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings, PresetName


class LanguageModels:
    """A family of language models; what of a family is not here, its own says (`whence.recipes.family.Family`)."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    style: ClassVar[TokenizerStyle] = "gpt2"
    over_run: ClassVar[bool] = False

    def head(self, rows: Sequence[Row], data: DataSettings) -> dict[str, Any]:
        """Return nothing: there are no labels."""
        return {}

    def preset(self, size: PresetName, tokenizer: Any, data: DataSettings, architecture: str) -> Any:
        """Return the configuration of a small language model, of the layers and width of `whence.recipes.family.SIZES`."""
        return language_model(size, tokenizer, data, architecture)


def refuse_labels(data: DataSettings, why: str) -> None:
    """Refuse settings about labels; `why`: such as "text has none".

    Raises:
        ConfigError: there is one.
    """
    if data.flip:
        raise ConfigError(f"flip replaces labels, and {why}. Leave --flip out.")
    if data.label is not None:
        raise ConfigError(f"label={data.label!r} names a column of labels, and {why}. Leave --label out.")
    if data.measurement == "margin":
        raise ConfigError("measurement='margin' is for classifiers; choose loss or log_odds.")
