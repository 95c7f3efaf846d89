"""The command `whence`: verbs, exit status and errors.

Exit status: 0 done; 1 failure that a corrected command does not mend; 2 usage or input error; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

import whence
from whence.cli import attribute, evaluate, index, output
from whence.cli.clean import clean
from whence.cli.config import read_config
from whence.cli.demo import demo
from whence.cli.estimate import estimate, select
from whence.cli.plan import plan
from whence.cli.query import query
from whence.cli.report import report
from whence.cli.serve import serve
from whence.cli.train import train
from whence.errors import MismatchError, NotFittedError, NumericalError, StorageError, WhenceError

# One line per verb, shown at the end of its help; the tests run each of them.
EXAMPLES = {
    "train": "whence train glue --task rte --preset tiny",
    "plan": "whence plan digits --strategy ekfac",
    "fit": "whence fit digits --strategy ekfac --max-examples 256",
    "score": "whence score digits --damping relative:0.1",
    "self": "whence self digits --k 20",
    "top": "whence top digits --query 0,3 --k 5 --bottom",
    "index": "whence index digits --keep 1/64",
    "query": "whence query digits --query 0,3 --k 5",
    "serve": "whence serve runs/digits/index/ekfac",
    "evaluate lds": "whence evaluate lds digits --scores ekfac --masks 4 --repeats 1",
    "evaluate counterfactual": "whence evaluate counterfactual digits --scores ekfac --remove 20 --mode sum",
    "evaluate agreement": "whence evaluate agreement runs/digits/scores/ekfac runs/digits/scores/identity",
    "evaluate mislabeled": "whence evaluate mislabeled digits",
    "evaluate tail-patch": "whence evaluate tail-patch digits --scores ekfac",
    "evaluate duplicates": "whence evaluate duplicates digits",
    "clean": "whence clean digits --fraction 0.05 --out cleaned.parquet",
    "estimate": "whence estimate digits --by cluster:10 --subsets 200 --calibration 4",
    "select": "whence select digits --by cluster:10 --calibration 4 --out selected.parquet",
    "report": "whence report runs/digits --out report.html",
    "demo": "whence demo --out runs/demo",
}

# What the library's remedy, a Python call, is on the command line.
HINTS: dict[type[WhenceError], str] = {
    NotFittedError: " On the command line: whence fit.",
    MismatchError: " On the command line: --overwrite with the verb that wrote it, or another --name or --run-dir.",
}
# Verbs that ask an index and write none, so that --overwrite is no option of theirs.
ASKS = {"query", "serve"}

GROUPS = {"evaluate": "Evidence for and against scores: retraining, wrong labels, agreement, checks of minutes."}

VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "plan": plan,
    "fit": attribute.fit,
    "score": attribute.score,
    "self": attribute.self_influence,
    "top": attribute.top,
    "index": index.index,
    "query": query,
    **{f"evaluate {name}": verb for name, verb in evaluate.VERBS.items()},
    "clean": clean,
    "estimate": estimate,
    "select": select,
    "report": report,
    "serve": serve,
    "demo": demo,
}


def make_app() -> App:
    """Return the parser with all verbs."""
    app = App(
        name="whence",
        help="Which training examples a trained PyTorch model's behaviour comes from.",
        help_epilogue="Start with: whence demo. Help on a verb: whence fit --help. Data goes to stdout, messages to stderr.",
        help_format="plaintext",
        version=f"whence {whence.__version__}",
        suppress_keyboard_interrupt=False,
    )
    groups: dict[str, App] = {"": app}
    for name, verb in VERBS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = App(name=group, help=GROUPS[group], help_format="plaintext")
            app.command(groups[group])
        groups[group].command(verb, name=last, help_epilogue=f"Example:\n{EXAMPLES[name]}")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `arguments` as in `sys.argv[1:]`, the default."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = make_app()
    app.meta.suppress_keyboard_interrupt = False

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Path | None = None,
        debug: Annotated[bool, Parameter(negative=())] = False,
    ) -> Any:
        """Read the options that every verb has, then run the verb.

        Args:
            config: YAML file of options, for example `strategy: kfac`. Options on the command line win over it.
            debug: Show the traceback of an error.
        """
        if config is not None:
            app.config = (read_config(config, VERBS),)
        return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")

    try:
        app.meta(given, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        output.message("whence: interrupted. Finished parts are kept: the same command continues from there.")
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  (the outermost frame of the program: every error becomes a message)
        if "--debug" in given:
            traceback.print_exc()
        return _report(error, given)
    return 0


def _report(error: Exception, given: list[str]) -> int:
    """Write one message for an error and return the exit status."""
    if isinstance(error, CycloptsError):
        verb = next((name for name in EXAMPLES if name.split() == given[: len(name.split())]), None)
        output.message(f"whence: {' '.join(str(error).split())} See: whence {verb + ' ' if verb else ''}--help")
        return 2
    if isinstance(error, WhenceError):
        hint = next((hint for kind, hint in HINTS.items() if isinstance(error, kind)), "")
        if isinstance(error, MismatchError) and ASKS.intersection(given[:1]):
            hint = " On the command line: whence fit and whence index with --overwrite make it anew; --name and --recipe name another."
        output.message(f"whence: {error}{hint}")
        failed = isinstance(error, NumericalError | StorageError) and not isinstance(error, MismatchError)
        return 1 if failed else 2
    output.message(f"whence: unexpected {type(error).__name__}: {error}. The same command with --debug shows where.")
    return 1


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())
