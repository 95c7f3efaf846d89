"""The page about a run folder as HTML: its style sheet, script and data inline, and nothing else allowed to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whence.report.embedded import content_policy, safe_json
from whence.report.page import templates

SIGN = (
    "A score is the first-order effect of training on a row. For it: training on the row lowered what is measured for the query, so for a "
    "loss it helped. Against it: it harmed. Bars compare rows with the strongest one of all for this query. "
    "Flipped: the label was made wrong on purpose. Tokens, where they are marked, are marked by their part of the score."
)
_SECTIONS = {
    "scores": ("queries", "Queries"),
    "self_influence": ("self-influence", "Self-influence"),
    "alike": ("alike", "Alike"),
    "evaluations": ("evaluations", "Evaluations"),
}
# What the script needs; the rest is in the markup already.
_EMBEDDED = ("scores", "rows")


def render_run(page: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        page: `title`, `notices`, `scores`, `self_influence`, `alike`, `evaluations`, `coverage`, `tables`, `history`, `rows`, `noise`,
            `shared` and `footer`, as `whence.report.run` gathers them.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    folder = Path(__file__).with_name("templates")
    style = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("style.css", "run.css"))
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("parts.js", "run.js"))
    contents = [entry for key, entry in _SECTIONS.items() if page[key]] + [("run", "The run")]
    template = templates().get_template("run.html")
    return str(
        template.render(
            page={**page, "contents": contents, "facts": _facts(page), "sign": SIGN},
            policy=content_policy(style=style, script=script),
            style=style,
            script=script,
            data=safe_json({key: page[key] for key in _EMBEDDED}),
        )
    )


def _facts(page: Mapping[str, Any]) -> str:
    """Say in a line what there is."""
    scores: Sequence[Mapping[str, Any]] = page["scores"]
    parts = []
    if scores:
        parts.append(f"{scores[0]['found']:,} queries, {scores[0]['shown_rows']} training rows")
        parts.append("scores: " + ", ".join(view["name"] for view in scores))
    if page["coverage"]:
        parts.append(f"{page['coverage']['share']} of the trained parameters attributed")
    return " · ".join(parts)
