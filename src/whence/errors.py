"""Every error whence raises on purpose.

A message says what came, what is allowed and what to do about it.

    WhenceError
    ├── ConfigError       an option or argument that cannot be used; correct the call
    ├── RecipeError       a recipe that cannot be found or does not return a Recipe
    ├── DataError         a data set or row that cannot be used; mend the data
    ├── LayerError        a layer that cannot be tracked, or whose sizes do not fit the batch
    ├── NumericalError    NaN or infinity, with the layer, the stage and the example ids
    ├── NotFittedError    scores were asked for before `fit`
    └── StorageError      a file of a run folder that cannot be used
        └── MismatchError the file is sound but belongs to another model, data set or setting
"""


class WhenceError(Exception):
    """Base class of all errors raised on purpose."""


class ConfigError(WhenceError, ValueError):
    """An option or argument that cannot be used."""


class RecipeError(WhenceError, ValueError):
    """A recipe that cannot be found or loaded."""


class DataError(WhenceError, ValueError):
    """A data set or row that cannot be used."""


class LayerError(WhenceError, ValueError):
    """A layer that cannot be tracked, or whose sizes do not fit the batch."""


class NumericalError(WhenceError, ArithmeticError):
    """NaN or infinity in a named layer and stage, with the example ids."""


class NotFittedError(WhenceError, RuntimeError):
    """Scores were asked for before the curvature was fitted."""


class StorageError(WhenceError, OSError):
    """A file of a run folder that is missing, truncated or altered."""


class MismatchError(StorageError):
    """A sound file that belongs to another model, data set or setting."""
