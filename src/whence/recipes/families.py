"""The families of Hugging Face models, by name."""

from __future__ import annotations

from whence.recipes.family import Family
from whence.recipes.glue import Glue
from whence.recipes.swag import Swag
from whence.recipes.wikitext import WikiText

FAMILIES: dict[str, Family] = {family.name: family for family in (Glue(), Swag(), WikiText())}
