"""whence: which training examples (and which parameters) a trained PyTorch model's behaviour comes from.

    attributor = whence.Attributor(model, whence.tasks.Classification(), run_dir="runs/mine").fit(train)
    scores = attributor.scores(queries, train)
    scores.top(query=0, k=10)

Names are imported when first used, so that `import whence` costs milliseconds and no extra is ever needed for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from whence import errors
from whence.errors import WhenceError

if TYPE_CHECKING:
    from whence import tasks
    from whence.attributor import Attributor
    from whence.capture.coverage import Coverage
    from whence.checkpoints import Checkpoints, mean_scores
    from whence.curvature.basis import Damping
    from whence.curvature.moments import second_moments
    from whence.curvature.refine import ConjugateGradients, Exact
    from whence.curvature.response import Unrolled
    from whence.index.index import Index
    from whence.plan.result import Plan
    from whence.recipes.base import Recipe, load_recipe
    from whence.scores.matrix import Scores

__version__ = "0.1.0"

__all__ = [
    "Attributor",
    "Checkpoints",
    "ConjugateGradients",
    "Coverage",
    "Damping",
    "Exact",
    "Index",
    "Plan",
    "Recipe",
    "Scores",
    "Unrolled",
    "WhenceError",
    "__version__",
    "errors",
    "load_recipe",
    "mean_scores",
    "second_moments",
    "tasks",
]

# Exported name -> the module that defines it; None: the name is a module of its own.
_LAZY: dict[str, str | None] = {
    "Attributor": "whence.attributor",
    "Checkpoints": "whence.checkpoints",
    "ConjugateGradients": "whence.curvature.refine",
    "Coverage": "whence.capture.coverage",
    "Damping": "whence.curvature.basis",
    "Exact": "whence.curvature.refine",
    "Index": "whence.index.index",
    "Plan": "whence.plan.result",
    "Recipe": "whence.recipes.base",
    "Scores": "whence.scores.matrix",
    "Unrolled": "whence.curvature.response",
    "load_recipe": "whence.recipes.base",
    "mean_scores": "whence.checkpoints",
    "second_moments": "whence.curvature.moments",
    "tasks": None,
}


def __getattr__(name: str) -> Any:
    """Import an exported name on first use (PEP 562) and keep it."""
    if name not in _LAZY:
        raise AttributeError(f"module 'whence' has no attribute {name!r}; it exports {', '.join(__all__)}.")
    module = _LAZY[name]
    value = import_module(f"whence.{name}") if module is None else getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the exported names, imported or not."""
    return __all__
