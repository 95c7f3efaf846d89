"""The peers' scores on the models of `finetune_lds.py`; a package that is not installed is said by ModuleNotFoundError."""

from __future__ import annotations

from functools import partial

import safetensors.torch
from torch import Tensor

from support.finetune_setting import Setting
from whence.recipes.retraining import START, Retraining
from whence.recipes.start import load_start

KINDS = {"glue": "classification", "swag": "choice", "wikitext": "lm"}


def kronfluence(setting: Setting, *, damping: float | None, empirical: bool = False) -> Tensor:
    """Return Kronfluence's EKFAC scores; damping None is a tenth of each layer's mean eigenvalue, 1e-8 its default."""
    from support.peer_hf import kronfluence_scores

    procedure = setting.recipe.retraining
    assert isinstance(procedure, Retraining)
    return kronfluence_scores(
        setting.recipe.model, KINDS[procedure.family.name], setting.recipe.queries, setting.recipe.train, setting.recipe.collate,
        damping=damping, empirical=empirical, work=setting.work / "kronfluence", name="peer", measurement=procedure.data.measurement,
    )  # fmt: skip


def trak(setting: Setting, *, models: int, proj_dim: int = 512, ridge: float = 0.1) -> Tensor:
    """Return TRAK's scores of the model itself, or of it and models of other seeds."""
    from support.peer_hf import trak_scores

    procedure = setting.recipe.retraining
    assert isinstance(procedure, Retraining)
    used = [setting.recipe.model]
    for file in setting.trained()[: models - 1]:
        model = load_start(procedure.family, setting.checkpoint / START, procedure.training)
        model.load_state_dict(safetensors.torch.load_file(file))
        used.append(model)
    return trak_scores(
        used, KINDS[procedure.family.name], setting.recipe.queries, setting.recipe.train, setting.recipe.collate,
        proj_dim=proj_dim, ridge=ridge,
    )  # fmt: skip


PEERS = {
    "Kronfluence ekfac, damping None": partial(kronfluence, damping=None),
    "Kronfluence ekfac, damping 1e-8": partial(kronfluence, damping=1e-8),
    "TRAK, 1 model": partial(trak, models=1),
    "TRAK, 3 models": partial(trak, models=3),
}
