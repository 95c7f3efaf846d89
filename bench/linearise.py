"""What do outputs and projected gradients cost, beside a loop of single-example autograd?

    python bench/linearise.py --name small
    python bench/linearise.py --width 768 --layers 12 --vocabulary 50257 --rows 16 --name gpt2

A GPT-2 of random weights with LoRA adapters (rank 4, all attention and MLP projections), rows of random tokens of uneven lengths
with the first third not trained. Measured: `Attributor.linearise` per token and averaged over tokens, from the first look at the
rows to the files on disk, with the projection to k numbers, at several batch sizes. The loop runs each example in a batch of one
and calls `torch.autograd.grad` for each token (or once for the mean); it keeps and projects nothing. `agreement` is the largest
difference between the inner products of both ways' gradients, relative to the largest, where there are few enough coordinates to
keep all. Bytes are those of the files, beside those of a float32 gradient per row. The first call of each way is not counted.
Writes results/linearise_NAME.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import peft
import torch
import transformers
from support.common import environment, print_table, write_results
from torch import Tensor, nn

import whence
from whence.pretrained.collator import Collator
from whence.refit.projection import LARGEST_WHOLE
from whence.refit.stored import StoredLinearised
from whence.tasks import CausalLM

Row = dict[str, list[int]]


def adapted(options: argparse.Namespace) -> nn.Module:
    """Return a GPT-2 with adapters whose second matrix is not zero, as after some training."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=options.width,
        n_layer=options.layers,
        n_head=max(1, options.width // 64),
        vocab_size=options.vocabulary,
        n_positions=max(64, options.tokens),
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def made_rows(options: argparse.Namespace) -> list[Row]:
    """Return rows of half to all of the tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(options.rows):
        length = int(torch.randint(options.tokens // 2, options.tokens + 1, (), generator=generator))
        ids = torch.randint(options.vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def odds_of(model: nn.Module, row: Row) -> Tensor:
    """Return the log-odds of the trained tokens, `[token]`, of a batch of one."""
    labels = torch.tensor(row["labels"])[1:]
    logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1][labels != -100]
    chosen = labels[labels != -100].unsqueeze(1)
    return logits.gather(1, chosen).squeeze(1) - logits.scatter(1, chosen, float("-inf")).logsumexp(1)


def loop(model: nn.Module, rows: Sequence[Row], *, per_token: bool, keep: bool = False) -> list[Tensor]:
    """Return (if asked to keep them) all gradients, in the order of the parameters, one autograd call each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = []
    for row in rows:
        odds = odds_of(model, row)
        for output in odds if per_token else [odds.mean()]:
            found = torch.autograd.grad(output, parameters, retain_graph=per_token)
            if keep:
                kept.append(torch.cat([g.flatten() for g in found]))
    return kept


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Return the wall-clock time of some calls after a first one."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def agreement(attributor: whence.Attributor, model: nn.Module, rows: list[Row]) -> float | None:
    """Compare inner products, which do not depend on the order of the coordinates."""
    if sum(p.numel() for p in model.parameters() if p.requires_grad) > LARGEST_WHOLE:
        return None
    ours = attributor.linearise(rows, projection="none", name="whole").gradients
    theirs = torch.stack(loop(model, rows, per_token=True, keep=True))
    wanted = theirs @ theirs.T
    return float((ours @ ours.T - wanted).abs().max() / wanted.abs().max())


def compared(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Time every way."""
    model, rows = adapted(options), made_rows(options)
    collate = Collator(model="GPT2LMHeadModel", columns=frozenset({"input_ids", "attention_mask", "labels"}), labels="next token")
    attributor = whence.Attributor(model, CausalLM(), run_dir=folder, collate=collate, progress=False)
    tracked = sum(layer.parameters for layer in attributor._layers)
    ways: dict[str, Any] = {}
    calls = itertools.count()

    def ours(**how: Any) -> StoredLinearised:
        # Under a new name each time: a store that is whole is read back.
        return attributor.linearise(rows, dimension=options.dimension, name=f"bench-{next(calls)}", **how)

    for per_token in (True, False):
        unit = "per token" if per_token else "mean"
        for size in options.batch_sizes:
            ways[f"linearise, {unit}, batches of {size}"] = seconds(partial(ours, per_token=per_token, batch_size=size), options.repeats)
        ways[f"loop, {unit}"] = seconds(partial(loop, model, rows, per_token=per_token), options.repeats)
    stored = ours()
    size = sum(path.stat().st_size for path in stored.folder.glob("*.safetensors"))
    return {
        "tracked": tracked,
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": len(rows),
        "token_rows": stored.rows,
        "agreement": agreement(attributor, model, rows[:4]),
        "seconds": ways,
        "bytes_per_row": size / stored.rows,
        "bytes_per_example": size / len(rows),
        "bytes_of_a_gradient": 4 * tracked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 128),
        ("layers", 4),
        ("vocabulary", 8192),
        ("tokens", 64),
        ("rows", 32),
        ("dimension", 400),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--name", default="small")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compared(options, folder)
    write_results(f"linearise_{options.name}", {"environment": environment(), "options": vars(options), **found})
    each = [
        [way, f"{1000 * statistics.median(times) / found['examples']:.1f}", f"{min(times):.2f} to {max(times):.2f}"]
        for way, times in found["seconds"].items()
    ]
    print_table(f"{found['token_rows']} tokens of {found['examples']} examples", ("way", "ms an example", "seconds in all"), each)
    print(f"{found['bytes_per_row']:.0f} bytes a row, {found['bytes_of_a_gradient']} of a float32 gradient; agreement {found['agreement']}")


if __name__ == "__main__":
    main()
