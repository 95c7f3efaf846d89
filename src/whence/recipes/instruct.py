r"""Instructions and what to say to them: Alpaca, FLAN, and any JSON lines of the same form.

Data: https://huggingface.co/datasets/tatsu-lab/alpaca (R. Taori et al., 2023). A row:
`{"instruction": "Name a primary colour.", "input": "", "output": "Red.", "skill": "other"}`. Other forms are told by their
columns: `inputs` and `targets` (FLAN), `prompt` and `completion`, `messages` (a chat, of which the last answer is trained),
or two columns named with `--columns PROMPT,ANSWER`.

    whence train instruct --preset small --checkpoint-dir checkpoints/base
    whence train instruct --model checkpoints/base --lora-rank 16 --checkpoint-dir checkpoints/alpaca
    whence score instruct --checkpoint-dir checkpoints/alpaca --strategy identity
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from whence.errors import ConfigError, DataError
from whence.recipes.prompted import Pair, Prompted, settled_prompts
from whence.recipes.rows import Row, Source
from whence.recipes.settings import DataSettings, PresetName

SOURCES = {
    # The hub has no validation split of Alpaca.
    "alpaca": Source(folder="alpaca", hub="tatsu-lab/alpaca", train="train[:90%]", validation="train[90%:]"),
    "flan_cot": Source(folder="flan_cot", hub="Open-Orca/FLAN", train="train[:99%]", validation="train[99%:]"),
}
_PAIRS = (("inputs", "targets"), ("prompt", "completion"))
_FORMS = "instruction and output, inputs and targets, prompt and completion, or messages"


@dataclass(frozen=True)
class Instruct(Prompted):
    """The family of instructions."""

    name: ClassVar[str] = "instruct"

    def settled(self, data: DataSettings) -> DataSettings:
        """Fill in what is not said: Alpaca, 256 tokens, the loss."""
        if data.columns is not None and len(data.columns) != 2:
            raise ConfigError(f"columns={data.columns!r}: name the column of the prompt and that of the answer.")
        return settled_prompts(data, task="alpaca", max_length=256)

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return the hyper-parameters of the published run: TinyLlama, 10 epochs of 2e-5; others for a random start."""
        return {
            "model": None if preset else "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
            "learning_rate": 1e-3 if preset else 2e-5,
            "weight_decay": 1e-4,
            "num_train_epochs": 3.0 if preset else 10.0,
            "train_batch_size": 16 if preset else 128,
            "eval_batch_size": 32,
        }

    def source(self, data: DataSettings) -> Source:
        """Return where the data set lies; another task names a folder, or a data set on the hub."""
        task = str(data.task)
        return SOURCES.get(task, Source(folder=task, hub=task))

    def pair(self, row: Row, number: int, data: DataSettings) -> Pair:
        """Return instruction and answer."""
        if data.columns is not None:
            return _pair(row, number, *data.columns)
        if row.get("messages") is not None:
            return _chat(row["messages"], number)
        if "instruction" in row:
            more = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
            prompt = f"### Instruction:\n{_text(row, 'instruction', number)}{more}\n\n### Response:\n"
            return Pair(prompt=prompt, answer=_text(row, "output", number))
        for names in _PAIRS:
            if names[0] in row:
                return _pair(row, number, *names)
        raise DataError(
            f"row {number} has the columns {', '.join(map(str, row))}; expected {_FORMS}. Name two others with --columns PROMPT,ANSWER."
        )

    def options(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> None:
        """Return nothing: an answer is free."""


def _pair(row: Row, number: int, prompt: str, answer: str) -> Pair:
    asked = _text(row, prompt, number)
    # A question and its answer must not run into each other.
    ends = asked.endswith("\n") or asked.rstrip().endswith(":")
    return Pair(prompt=asked if ends else f"{asked}\n", answer=_text(row, answer, number))


def _text(row: Row, column: str, number: int) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"{value!r:.60} there" if column in row else f"the columns {', '.join(map(str, row))}"
        raise DataError(f"row {number} has no text in {column!r}; it has {found}. Expected {_FORMS}, each of them text.")
    return value


def _chat(messages: Any, number: int) -> Pair:
    """Return all turns before the last answer as the prompt, each under its role."""
    turns = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else []
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns):
        raise DataError(f"row {number}: its messages are no list of objects with role and content, both text.")
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise DataError(f"row {number}: its messages have no answer of the role 'assistant' to anything. Drop the row or give one.")
    prompt = "".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in turns[:last])
    return Pair(prompt=f"{prompt}<|assistant|>\n", answer=turns[last]["content"])
