"""Options from a YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from cyclopts.config import Dict

from whence.errors import ConfigError


def read_config(path: Path, verbs: Iterable[str]) -> Dict:
    """Read a YAML file of options for any of the verbs, as the parser takes them; it reports keys that the verb does not have.

    Raises:
        ConfigError: no such file, no valid YAML, or no mapping at its top level.
    """
    if not path.is_file():
        raise ConfigError(f"--config {path}: there is no such file. Give a YAML file of options, or leave --config out.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML{where}: write one `option: value` per line.") from None
    if options is None:
        options = {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"--config {path} holds a {type(options).__name__}; write one `option: value` per line, with names as keys.")
    # Under every verb, and not flat: from a flat mapping the parser drops what is named as a verb is, such as the option query.
    tree: dict[str, Any] = {}
    for verb in verbs:
        *groups, last = verb.split()
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = options
    return Dict(tree, source=str(path))
