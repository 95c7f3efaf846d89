"""Do scores predict what real retraining does, and which scores do it best?

    python bench/digits_lds.py --work runs/digits_lds

The network of the digits recipe is trained again on 100 random halves of its 1,200 training rows, 5 times each, and the
first 200 test digits are measured: their loss, and minus the log-odds of the label (margin). Each method scores the
training rows for these digits on models trained on all rows; its linear datamodeling score (LDS) says how well it ranks
the retrained models. 20 of the halves are only used to choose a damping; the figures are of the other 80.

The retrained models' measurements and the fitted factors are kept in the work folder; a run that was stopped continues.
Prints a table, writes results/digits_lds.json. The first run takes about 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results
from support.digits_methods import METHODS, REFERENCE, chosen_damping
from support.digits_setting import DIGITS, QUERIES, Measurement, Setting, as_losses, make_bank

from whence.evaluate.lds import Lds, lds
from whence.evaluate.retrain import RetrainBank
from whence.runtime.device import one_thread

RESAMPLES = 1000


def settings_of(margins: RetrainBank, work: Path, calibration: int) -> dict[Measurement, Setting]:
    """Return one setting per measurement, on the same subsets."""
    banks: dict[Measurement, RetrainBank] = {"loss": as_losses(margins), "margin": margins}
    settings = {}
    for measurement, bank in banks.items():
        aside, reported = bank.split(calibration=calibration)
        settings[measurement] = Setting(work=work, measurement=measurement, calibration=aside, reported=reported)
    return settings


def run(settings: dict[Measurement, Setting], names: list[str]) -> dict[str, dict[Measurement, Lds]]:
    """Score and judge every method; one that needs a package that is missing is left out, and this is said."""
    results: dict[str, dict[Measurement, Lds]] = {}
    for name in names:
        start = time.perf_counter()
        try:
            results[name] = {m: lds(METHODS[name](setting), setting.reported, resamples=RESAMPLES) for m, setting in settings.items()}
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error.name} is not installed", file=sys.stderr)
            continue
        print(f"{name}: {results[name]['loss'].mean:.3f}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return results


def to_json(score: Lds, reference: Lds | None) -> dict[str, Any]:
    """Return a score's figures; `minus_reference` is [difference, low, high] in the same bootstrap samples."""
    figures: dict[str, Any] = {"lds": score.mean, "low": score.low, "high": score.high}
    if reference is not None:
        figures["minus_reference"] = score.minus(reference)
    return figures


def show(results: dict[str, dict[Measurement, Lds]], settings: dict[Measurement, Setting]) -> None:
    """Print the table."""
    rows = []
    for name, scores in results.items():
        # The margins say the same; their differences are in the file.
        same = REFERENCE not in results or name == REFERENCE
        difference = "" if same else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*scores["loss"].minus(results[REFERENCE]["loss"]))
        intervals = {m: f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]" for m, score in scores.items()}
        rows.append([name, intervals["loss"], difference, intervals["margin"]])
    columns = ["method", "LDS, loss", f"less {REFERENCE!r}", "LDS, margin"]
    first = next(iter(results.values()))
    quality = "\n".join(f"{m}: reliability {s.reliability:.3f}, ceiling {s.ceiling:.3f}" for m, s in first.items())
    subsets, repeats, queries = next(iter(settings.values())).reported.measurements.shape
    print_table(f"LDS with 95% intervals, {subsets} subsets, {repeats} retrains each, {queries} queries\n{quality}", columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/digits_lds"), help="folder of retrains and factors")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calibration", type=int, default=20, help="subsets that only choose the damping")
    parser.add_argument("--jobs", type=int, default=2, help="retrains at a time")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="only these; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    margins = make_bank(options.work, subsets=options.subsets, repeats=options.repeats, jobs=options.jobs)
    with one_thread():
        settings = settings_of(margins, options.work, options.calibration)
        results = run(settings, options.methods or list(METHODS))
        show(results, settings)
        if options.methods:
            return 0
        chosen = {m: chosen_damping(setting) for m, setting in settings.items()}
    first = results[REFERENCE]
    figures = {
        "environment": environment(),
        "settings": {
            "digits": asdict(DIGITS), "train": margins.masks.shape[1], "rows_of_a_subset": int(margins.masks[0].sum()),
            "subsets": len(margins.masks), "calibration_subsets": options.calibration, "repeats": options.repeats,
            "queries": QUERIES, "resamples": RESAMPLES, "interval": "95%, bootstrap over queries and reported subsets",
        },
        "bank": {m: {"reliability": score.reliability, "ceiling": score.ceiling} for m, score in first.items()},
        "calibration": {
            m: {"damping": vars(c.damping), "scale": c.scale, "table": [[vars(d), score] for d, score in c.table]}
            for m, c in chosen.items()
        },
        "reference": REFERENCE,
        "methods": {name: {m: to_json(s, first[m]) for m, s in scores.items()} for name, scores in results.items()},
    }  # fmt: skip
    write_results("digits_lds", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
