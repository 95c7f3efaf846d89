"""The honest account of what is attributed and what is not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Coverage:
    """The share of the model's trainable parameters that is attributed, and what is left out with the reason."""

    tracked: dict[str, int]
    trainable: int
    left_out: list[tuple[str, str]]

    @property
    def share(self) -> float:
        """Tracked parameters over trainable ones."""
        return sum(self.tracked.values()) / self.trainable if self.trainable else 0.0

    def drop(self, name: str, reason: str) -> None:
        """Move a layer that turned out not to be attributable to what is left out."""
        if self.tracked.pop(name, None) is not None:
            self.left_out.append((name, reason))

    def __str__(self) -> str:
        """One line, and one for each reason why something is left out."""
        lines = [f"Attributed: {sum(self.tracked.values()):,} of {self.trainable:,} trainable parameters "
                 f"({self.share:.1%}), {len(self.tracked)} layers."]  # fmt: skip
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            lines.append(f"Left out, {reason}: {shown}.")
        return "\n".join(lines)
