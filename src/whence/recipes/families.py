"""The families of Hugging Face models, by name, and their recipes."""

from __future__ import annotations

from functools import partial

from whence.recipes.cot import ChainOfThought
from whence.recipes.family import Family
from whence.recipes.finetune import open_checkpoint
from whence.recipes.glue import Glue
from whence.recipes.instruct import Instruct
from whence.recipes.stdlib import Stdlib
from whence.recipes.swag import Swag
from whence.recipes.wikitext import WikiText

FAMILIES: dict[str, Family] = {family.name: family for family in (Glue(), Swag(), WikiText(), Stdlib(), Instruct(), ChainOfThought())}
glue, swag, wikitext, stdlib, instruct, cot = (partial(open_checkpoint, family) for family in FAMILIES.values())
