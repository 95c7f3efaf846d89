"""Settings as JSON values: made comparable with what a file holds, and compared field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from whence.errors import ConfigError


def plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return `value` as it comes back from a JSON file, keys sorted, so that it can be compared with a stored one."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} of a store must be JSON (dict, list, str, number, bool, None): {error}.") from None
    return plain


def differences(stored: Any, present: Any, field: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield `(dotted field, stored value, present value)` for each field that differs, in sorted order."""
    if isinstance(stored, dict) and isinstance(present, dict):
        for key in sorted(stored.keys() | present.keys()):
            dotted = f"{field}.{key}" if field else key
            if key in stored and key in present:
                yield from differences(stored[key], present[key], dotted)
            else:
                old, new = (shorten(json.dumps(side[key])) if key in side else "absent" for side in (stored, present))
                yield dotted, old, new
    elif json.dumps(stored) != json.dumps(present) and not (stored == present and _is_number(stored) and _is_number(present)):
        yield field, shorten(json.dumps(stored)), shorten(json.dumps(present))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shorten(text: str, limit: int = 200) -> str:
    """Return `text` cut to `limit` characters, saying so."""
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text)} characters)"
