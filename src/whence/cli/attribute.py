"""The verbs fit, score, self and top: one library call each, and the printing of what it returns."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from whence.cli import output
from whence.cli.listing import query_entry, query_lines, row_entry, row_lines, text_of
from whence.cli.opening import Flat, RecipeName, open_recipe, open_snapshots, run_folder
from whence.cli.options import DataOptions, FitOptions, InverseOptions, KeepOptions, ListOptions, ScoreOptions, Strategy
from whence.cli.values import Count, Numbers, Switch, parse_damping, parse_response
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.attributor import Attributor
    from whence.curvature.refine import SolverLike
    from whence.recipes.base import Recipe
    from whence.scores.matrix import Scores

SHOWN_BY_DEFAULT = 5


def fit(
    recipe: RecipeName,
    /,
    *,
    fitting: Annotated[FitOptions, Flat] = FitOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Fit the curvature of a recipe's model on its training rows and store it in the run folder."""
    attributor, found = open_recipe(recipe, run, data)
    attributor.fit(found.train, batch_size=run.batch_size, overwrite=run.overwrite, **vars(fitting))
    values = {"recipe": found.name, "run_dir": str(run_folder(found, run)), "strategy": fitting.strategy, "empirical": fitting.empirical}
    _finish(attributor, values, run)


def score(
    recipe: RecipeName,
    /,
    *,
    inverse: Annotated[InverseOptions, Flat] = InverseOptions(),  # noqa: B008
    scoring: Annotated[ScoreOptions, Flat] = ScoreOptions(),  # noqa: B008
    k: Count = 10,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Score every query of a recipe against every training row and store the scores in the run folder.

    Classifiers of whence train are scored over the snapshots of their training by default, by the cosine of gradients.

    Args:
        k: Strongest proponents and opponents per query in the table that is written beside the scores.
    """
    from whence.evidence.scoring import score_recipe

    solver, damping, response = _solver(scoring), parse_damping(inverse.damping), parse_response(inverse.response)
    attributor, found = open_recipe(recipe, run, data)
    made = score_recipe(
        attributor,
        found,
        snapshots=partial(open_snapshots, found, run),
        strategy=inverse.strategy,
        damping=damping,
        response=response,
        solver=solver,
        batch_size=run.batch_size,
        overwrite=run.overwrite,
        **{name: value for name, value in vars(scoring).items() if name not in ("solver", "draws")},
    )
    scores = made.scores
    folder = _scores_folder(run_folder(found, run), made.name)
    table = folder.with_name(f"{made.name}_top.parquet")
    if not scores.sums_rows:
        scores.to_parquet(table, k=k)
    queries, train = scores.values.shape
    kind = {"strategy": made.strategy, "damping": inverse.damping, "over_run": made.over_run, "normalize": made.normalize}
    values = {"recipe": found.name, **kind}
    _finish(
        attributor,
        values | {"queries": queries, "train": train, "scores": str(folder), "table": None if scores.sums_rows else str(table)},
        run,
    )


def _solver(scoring: ScoreOptions) -> SolverLike:
    if scoring.draws is None:
        return scoring.solver
    if scoring.solver != "cg":
        raise ConfigError(f"--draws {scoring.draws} is for --solver cg; give both, or leave --draws out.")
    from whence.curvature.refine import ConjugateGradients

    return ConjugateGradients(draws=scoring.draws)


def self_influence(
    recipe: RecipeName,
    /,
    *,
    inverse: Annotated[InverseOptions, Flat] = InverseOptions(),  # noqa: B008
    on: Literal["loss", "measurement"] = "loss",
    name: str | None = None,
    listing: Annotated[ListOptions, Flat] = ListOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Rank a recipe's training rows by self-influence: wrong labels and unusual rows come first.

    Args:
        on: Each row's influence on its own loss, or on its own measurement.
        name: Folder of these values within the run folder. Default: the strategy's name.
    """
    damping, response = parse_damping(inverse.damping), parse_response(inverse.response)
    attributor, found = open_recipe(recipe, run, data)
    strategy = inverse.strategy or "ekfac"
    values = attributor.self_influence(
        found.train,
        strategy=strategy,
        damping=damping,
        response=response,
        on=on,
        name=name,
        batch_size=run.batch_size,
        overwrite=run.overwrite,
    )

    from whence.scores.self_influence import to_parquet

    path = run_folder(found, run) / "self_influence.parquet"
    to_parquet(path, values)
    order = values.argsort(descending=True, stable=True).tolist()
    ends = {"largest": order[: listing.k]} | ({"smallest": order[::-1][: listing.k]} if listing.bottom else {})
    lists = {side: [row_entry(found, t, float(values[t])) for t in rows] for side, rows in ends.items()}
    lines = [line for side, rows in lists.items() for line in (f"{side} self-influence", *row_lines(rows))]
    output.data(lines, {"recipe": found.name, "strategy": strategy, "table": str(path), **lists}, as_json=run.json)
    output.message(f"all rows: {path}")
    output.closing(attributor)


def top(
    recipe: RecipeName,
    /,
    *,
    query: Numbers | None = None,
    strategy: Strategy | None = None,
    name: str | None = None,
    listing: Annotated[ListOptions, Flat] = ListOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run_dir: Path | None = None,
    json: Switch = False,
) -> None:
    """List the training rows that speak most strongly for each query, from saved scores; no computation.

    Args:
        query: Queries to list, for example 0,3,7. Default: the first five.
        strategy: The strategy whose scores are read. Default: what whence score makes by default.
        name: Folder of the scores in the run folder, if they were given one.
        run_dir: Run folder. Default: runs/NAME, after the recipe's name.
        json: Print the data as JSON.
    """
    from whence.evidence.saved import scores_to_list
    from whence.evidence.scoring import usual_name
    from whence.recipes.base import load_recipe

    found = load_recipe(recipe, **data.given())
    usual = usual_name(found)
    folder = _scores_folder(run_dir or Path("runs") / found.name, name or strategy or usual)
    if not folder.exists():
        like = f" --strategy {strategy or 'ekfac'}" if strategy or not found.over_run else ""
        raise ConfigError(
            f"{folder} does not exist: there are no {strategy or usual} scores to list. Run first: whence score {recipe}{like}, "
            f"or name another --run-dir, --strategy or --name (exact, or {strategy or 'ekfac'}-cg, for a solver's)."
        )
    scores = scores_to_list(folder, found)
    chosen = _chosen(scores, query)
    listed = [_for_query(found, scores, q, listing) for q in chosen]
    lines = [line for entry in listed for line in query_lines(entry)]
    output.data(lines, {"recipe": found.name, "strategy": strategy or usual, "queries": listed}, as_json=json)
    if query is None and len(chosen) < len(scores.values):
        output.message(f"queries 0 to {len(chosen) - 1} of {len(scores.values)}; choose others with --query 0,3,7")


def _scores_folder(run_dir: Path, strategy: str) -> Path:
    return run_dir / "scores" / strategy


def _finish(attributor: Attributor, values: dict[str, Any], run: KeepOptions) -> None:
    output.data(output.facts(values), values | {"coverage": output.coverage_facts(attributor)}, as_json=run.json)
    output.closing(attributor)


def _chosen(scores: Scores, query: list[int] | None) -> list[int]:
    if query is None:
        return list(range(min(SHOWN_BY_DEFAULT, len(scores.values))))
    if scores.query_rows is not None:  # some of the queries were scored: they keep their numbers
        missing = [q for q in query if q not in scores.query_rows]
        if missing:
            raise ConfigError(f"--query {missing[0]}: the scored queries are {', '.join(map(str, scores.query_rows[:20]))}.")
        return [scores.query_rows.index(q) for q in query]
    for q in query:
        if q >= len(scores.values):
            raise ConfigError(f"--query {q}: there are {len(scores.values)} scored queries, numbered from 0 to {len(scores.values) - 1}.")
    return query


def _for_query(found: Recipe, scores: Scores, query: int, listing: ListOptions) -> dict[str, Any]:
    sides = {"proponents": scores.top(query, listing.k)} | ({"opponents": scores.bottom(query, listing.k)} if listing.bottom else {})
    row = query if scores.query_rows is None else scores.query_rows[query]
    summed = scores.settings.get("aggregate") == "queries"
    return query_entry(found, row, "the sum of all queries" if summed else text_of(found, found.queries[row]), sides)
