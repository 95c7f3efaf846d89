"""The verb serve: a local page on which an index is asked."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter, validators

from whence.cli import output
from whence.cli.opening import Flat, IndexName, IndexRecipe, open_index
from whence.cli.options import DataOptions, RunOptions
from whence.cli.values import Count, Share
from whence.errors import ConfigError


def serve(
    source: IndexName,
    /,
    *,
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65535))] = 8017,
    host: str = "127.0.0.1",
    recipe: IndexRecipe = None,
    strategy: str | None = None,
    name: str | None = None,
    k: Count = 10,
    rescore: Share = 0.05,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Serve a local page on which an index is asked: type a query, read which training rows it comes from. Ctrl-C ends it.

    Args:
        port: Where the page is; 0 takes a free port.
        host: Address to listen on. The default is reached from this machine alone; there is no password, so leave it at that.
        strategy: The index to ask, by its name or the strategy's. Default: ekfac.
        name: Folder of the index in the run folder, if it was given one.
        k: Rows on each side, to begin with; 1 to 100.
        rescore: Share of the rows that are scored exactly where the page asks for it; 0 offers the index's own scores alone.
    """
    from whence.serve.answers import Answers, check_k
    from whence.serve.guard import is_loopback
    from whence.serve.run import listening, serve, url_of

    check_k(k)
    if run.batch_size != "auto":
        raise ConfigError("--batch-size is for verbs that go through all training rows, and serve does not. Leave it out.")
    with listening(host, port) as bound:
        address = url_of(bound)
        if not is_loopback(host):
            output.message(f"--host {host}: whoever reaches this machine can ask the model and read training rows; there is no password.")
        _, found, index = open_index(source, run, data, recipe=recipe, strategy=strategy, name=name)

        def ready(url: str) -> None:
            output.message(f"Serving {index.folder} at {url} (Ctrl-C ends it)")
            if run.json:
                output.data([], {"url": url, "recipe": found.name, "index": str(index.folder)}, as_json=True)

        try:
            serve(Answers(found, index, rescore=rescore, k=k), bound, host=host, ready=ready)
        except KeyboardInterrupt:
            output.message(f"Stopped serving at {address}")
