"""Cases as data: a model, a task, rows and how they are collated, and the layers that must be tracked.

`EMPIRICAL` holds all cases; the ones in `SAMPLED` have a task that can also draw labels. Every case has 13 training rows and batches
of 5 (4 queries, batches of 3), so the last batch is ragged. Each covariance is built from more positions than it has dimensions:
a rank-deficient one has a null space whose basis is arbitrary, and EKFAC's eigenvalues depend on that basis
(`test_capture_cases.py` checks that no eigenvalue is repeated).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

import case_models as m
import case_models_conv as c
import case_tasks as t
from case import STRATEGIES, WATCHED, Case, build, differences, simple, vectors, watch
from case_data import (
    collate_groups,
    collate_packed,
    collate_padded,
    collate_streams,
    collate_tagged,
    gated,
    groups,
    integer,
    labelled,
    normal,
    pairs,
    sequences,
    targeted,
)
from cases_attention import ATTENTION, ENCODER
from cases_combined import COMBINED
from cases_embedding import EMBEDDINGS
from cases_fallback import FALLBACK, MIXED
from cases_norm import NORMS
from whence.tasks import Regression

__all__ = ["EMPIRICAL", "SAMPLED", "STRATEGIES", "WATCHED", "Case", "build", "case_named", "differences", "simple", "vectors", "watch"]

many_positions = partial(labelled, shape=(7, 4))
images = partial(labelled, shape=(4, 5, 6))


def conv(name: str, channels: int = 6, **options: Any) -> Case:
    """A convolution with these options."""
    return Case(name=f"conv_{name}", factory=partial(c.ConvNet, channels, **options), rows=images, tracked=("conv", "head"))


LINEAR = [
    simple("mlp", m.mlp, "0 2 4"),
    simple("mlp_without_biases", partial(m.mlp, bias=False), "0 2 4"),
    simple("regression", partial(m.mlp, last=2), "0 2 4", rows=partial(targeted, shape=(4,), out=(2,)), task=Regression),
    simple("positions", m.MeanPooled, "inner head", rows=many_positions),
    simple("grid_of_positions", m.MeanPooled, "inner head", rows=partial(labelled, shape=(2, 3, 4))),
    simple("label_per_position", m.PerPosition, "inner head", rows=lambda g, n: [(normal(g, 7, 4), integer(g, 3, 7)) for _ in range(n)]),
    simple("reused", m.Reused, "enter again head"),
    simple("reused_unevenly", m.ReusedUnevenly, "again head", rows=many_positions),
    simple("two_names", m.TwoNames, "first head"),
    simple("tied", m.Tied, "first head"),
    simple("subclass", m.subclassed, "0 2"),
    simple("keyword_call", m.KeywordCall, "inner head"),
    simple("in_place_relu", m.in_place_relu, "0 2 4"),
    simple("in_place_view", m.InPlaceView, "inner head"),
    simple("in_place_input", m.InPlaceInput, "enter inner head"),
    simple("conv1d_of_transformers", m.TransposedWeights, "inner head", rows=many_positions, needs="transformers"),
]

CONVOLUTIONS = [
    conv("plain"),
    conv("without_bias", bias=False),
    conv("stride", stride=(2, 3)),
    conv("padding", padding=(2, 1)),
    conv("dilation", dilation=(1, 3)),
    conv("all_three", stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
    conv("groups", groups=2),
    conv("groups_without_bias", groups=2, bias=False, padding=1),
    conv("depthwise", channels=4, groups=4),
    conv("depthwise_multiplied", channels=8, groups=4, stride=2),
    conv("valid", padding="valid"),
    conv("same", padding="same"),
    conv("same_dilated", padding="same", dilation=(1, 2)),
    conv("reflect", padding=(1, 2), padding_mode="reflect"),
    conv("replicate", padding=(1, 2), padding_mode="replicate"),
    conv("circular", padding=(1, 2), padding_mode="circular"),
    conv("same_circular", padding="same", padding_mode="circular"),
    conv("groups_reflect", groups=2, padding=(2, 1), padding_mode="reflect", stride=2),
    conv("in_place_relu", activation=nn.ReLU(inplace=True)),
    simple("conv_reused", c.ReusedConv, "conv head", rows=images),
    simple("conv_batchnorm", c.NormedConvNet, "conv norm squeeze head", rows=images),
]

SELECTION = [
    simple("late_layers", m.Blocks, "blocks.1.down head", layers=["blocks.1.down", "head"]),
    simple("pattern", m.Blocks, "blocks.0.up blocks.1.up", layers=["blocks.*.up"]),
    simple("all_layers", m.Blocks, "enter blocks.0.up blocks.0.down blocks.1.up blocks.1.down head", layers="all"),
    simple("partly_frozen", m.partly_frozen, "blocks.1.up blocks.1.down head"),
    simple("half_frozen", m.half_frozen, "0 2 4"),
    simple("with_hooks", m.with_hooks, "0 2 4"),
    simple("attention", m.Attention, ENCODER, rows=many_positions),
    simple("checkpointed", partial(m.Blocks, checkpointed=True), "enter blocks.0.up blocks.0.down blocks.1.up blocks.1.down head"),
    simple("single_layer", lambda: nn.Sequential(nn.Linear(4, 3)), "0"),
]

EXAMPLES = [
    simple(
        "choices",
        m.Choices,
        "inner head",
        rows=partial(labelled, shape=(4, 2, 5), classes=4),
        task=partial(t.ChoiceTask, measurement="margin"),
    ),
    simple("uneven_groups", m.PerPosition, "inner head", rows=groups, task=t.GroupTask, collate=collate_groups, sampled=False),
    simple("packed", m.PerPosition, "inner head", rows=sequences, task=t.PackedTask, collate=collate_packed, sampled=False),
    simple(
        "packed_without_mask", m.PerPosition, "inner head", rows=sequences, task=t.UnmaskedPackedTask, collate=collate_packed, sampled=False
    ),
    simple(
        "padded",
        m.MaskedPool,
        "inner deeper head",
        rows=sequences,
        task=partial(t.PaddedTask, inputs="inputs", labels="labels", measurement="margin"),
        collate=collate_padded,
    ),
    simple(
        "padded_labels",
        m.PerPosition,
        "inner head",
        rows=sequences,
        task=partial(t.TaggingTask, inputs="inputs", labels="labels"),
        collate=collate_tagged,
    ),
    simple(
        "two_paddings",
        m.TwoStreams,
        "source.inner source.deeper source.head target.inner target.deeper target.head head",
        rows=sequences,
        task=partial(t.StreamsTask, inputs="inputs", labels="labels"),
        collate=collate_streams,
    ),
    simple("used_without_gradient", m.LookAhead, "inner head"),
    simple("branch_not_always_taken", m.Gated, "inner branch head", rows=gated),
    simple("model_called_twice", partial(m.mlp, last=2), "0 2 4", rows=pairs, task=t.PairTask, sampled=False),
    simple("measured_by_one_head", m.TwoHeads, "trunk head other", rows=partial(labelled, shape=(4,), classes=5), task=t.HeadsTask),
    simple("transformed_gradients", partial(m.mlp, last=2), "0 2 4", rows=partial(targeted, shape=(4,), out=(2,)), task=t.ClippedTask),
]

EMPIRICAL = [*LINEAR, *CONVOLUTIONS, *SELECTION, *EXAMPLES, *NORMS, *EMBEDDINGS, *ATTENTION, *FALLBACK, *MIXED, *COMBINED]
SAMPLED = [case for case in EMPIRICAL if case.sampled]


def case_named(name: str) -> Case:
    return next(case for case in EMPIRICAL if case.name == name)
