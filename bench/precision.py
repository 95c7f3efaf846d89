"""What half precision costs in agreement: EKFAC scores with bfloat16 and float16 operands beside float32.

    python bench/precision.py [--encoder FOLDER --sentences FILE.jsonl]

Four small random models and the trained digits network; with `--encoder`, a Hugging Face encoder folder and a
JSONL file of sentences and labels too. Operands are rounded, sums are float32: on a CPU that is what whence does, at float32's
speed. Prints the mean over queries of Spearman's correlation with float32, and the least; writes results/precision.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, spearman_rows, write_results
from support.models import bert, conv_net, gpt2, mlp
from support.ours import task_of

import whence
from whence.recipes.digits import DigitsSettings, build_network, load_data, train_network
from whence.tasks import Classification, SequenceClassification

PRECISIONS = ("bfloat16", "float16")


def scores(options: dict[str, Any], train: Any, queries: Any) -> dict[str, torch.Tensor]:
    """Return scores and self-influence at every precision, each with factors of its own."""
    found = {}
    for precision in ("float32", *PRECISIONS):
        attributor = whence.Attributor(**options, precision=precision, device="cpu", progress=False).fit(train, strategy="ekfac")
        found[precision] = attributor.scores(queries, train).values
        found[f"{precision} self"] = attributor.self_influence(train).unsqueeze(0)
    return found


def cases() -> dict[str, tuple[dict[str, Any], Any, Any]]:
    """Return models with tasks, training rows and queries, by name."""
    found: dict[str, tuple[dict[str, Any], Any, Any]] = {}
    for make in (mlp, conv_net, bert, gpt2):
        torch.manual_seed(0)
        case = make(300, 40)
        task = Classification() if case.collate is None else task_of(case)
        if case.collate is not None:
            task.sampled_loss = lambda model, batch, noise, task=task: task.loss(model, batch)  # the data's own labels
        found[case.name] = {"model": case.model, "task": task, "collate": case.collate}, case.train, case.queries
    settings = DigitsSettings()
    data, network = load_data(settings), build_network(0)
    train_network(network, data.train, settings)
    found["digits network"] = {"model": network, "task": Classification()}, data.train, data.test[:100]
    return found


def encoder(folder: Path, sentences: Path) -> tuple[dict[str, Any], Any, Any]:
    """Return a pretrained encoder with a small head, trained for a minute on the first 600 sentences."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    lines = [json.loads(line) for line in sentences.read_text(encoding="utf-8").splitlines()[:700]]
    rows = [{**tokenizer(line["sentence"], truncation=True, max_length=64), "labels": int(line["label"])} for line in lines]
    collate = DataCollatorWithPadding(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for start in range(0, 600, 16):
        optimizer.zero_grad()
        model(**collate(rows[start : start + 16])).loss.backward()
        optimizer.step()
    return {"model": model.eval(), "task": SequenceClassification(), "collate": collate}, rows[:600], rows[600:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--sentences", type=Path)
    options = parser.parse_args()
    found = cases()
    if options.encoder and options.sentences:
        found["pretrained encoder, SST-2"] = encoder(options.encoder, options.sentences)
    rows, figures = [], {}
    for name, (parts, train, queries) in found.items():
        values = scores(parts, train, queries)
        figures[name] = {}
        for precision in PRECISIONS:
            each = spearman_rows(values[precision], values["float32"])
            own = spearman_rows(values[f"{precision} self"], values["float32 self"])[0]
            figures[name][precision] = {"mean": sum(each) / len(each), "least": min(each), "self_influence": own}
            rows.append([name, precision, *(f"{x:.5f}" for x in figures[name][precision].values())])
    print_table("Spearman with float32, EKFAC", ["model", "operands", "mean", "least", "self-influence"], rows)
    write_results("precision", {"environment": environment(), "models": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
