"""Data and a script within a page, such that no text of the data can ever be taken for markup or code."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

# Within a script element only these could end it, open a comment, or end a line of JavaScript.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def safe_json(value: Any) -> str:
    """Return JSON for a script element of type application/json: ASCII, without `<`, `>` and `&`.

    Lone surrogates become `?`, as they do in the page's own text: browsers cannot write them out again.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode("utf-8")
    return json.dumps(json.loads(text), separators=(",", ":")).translate(_ESCAPES)


def content_policy(*, style: str, script: str) -> str:
    """Return the content security policy of a page with this style sheet and script inline, and nothing else but images in it."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
