"""Optional packages: imported where they are needed, and missed with one clear error."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal

from whence.errors import ConfigError


def need(name: str, what: str, extra: Literal["hf", "report", "serve", "faiss"]) -> ModuleType:
    """Import a module of an optional package.

    Args:
        name: of the module.
        what: begins the error, such as "a report needs".
        extra: the extra of whence that brings the package.

    Raises:
        ConfigError: it, or a package that it imports, is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise ConfigError(f'{what} {missing}, which is not installed. Install it with: pip install "whence[{extra}]"') from error
