r"""Questions with a chain of thought before the answer: StrategyQA and CommonsenseQA.

Data: https://huggingface.co/datasets/ChilleD/StrategyQA (M. Geva et al., 2021), `tau/commonsense_qa` (A. Talmor et al., 2019) with
the rationales of ECQA (S. Aggarwal et al., 2021). A row of the first: `{"qid": "e004", "question": "Are emus related to elks?",
"answer": false, "rationale": "Emus are birds. Elks are deer."}`; `rationale` may be a list, and each is a training row.

    whence train cot --task strategy_qa --preset small --checkpoint-dir checkpoints/base
    whence train cot --task strategy_qa --model checkpoints/base --lora-rank 16 --runs 8 --checkpoint-dir checkpoints/strategy

The model reads the question, with its choices if there are some, and says the rationale, a line end, and "The answer is no.".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from whence.errors import ConfigError, DataError
from whence.recipes.base import Options
from whence.recipes.prompted import Pair, Prompted, encode_pair, settled_prompts
from whence.recipes.rows import Row, Source
from whence.recipes.settings import DataSettings, PresetName

STEM = "The answer is"
_EXPECTED = "Expected question, rationale (a text or a list), answer, and choices with answerKey where there are some."
_IDS = ("qid", "id")
_TRUTH = {True: "yes", False: "no"}


def unfold(rows: list[Row], split: str) -> list[Row]:
    """Return a row for every rationale of a question in the training split; of other questions the first rationale.

    A question without an id is named by its number among those that were read. One whose list of rationales is empty is left out
    of training, with a warning; as a query it is asked with no rationale before the answer.
    """
    found: list[Row] = []
    without = 0
    for number, read in enumerate(rows):
        named = any(read.get(key) is not None for key in _IDS)
        row = read if named else {**read, "id": str(number)}
        rationales = row.get("rationale", row.get("rationales"))
        if not isinstance(rationales, list):
            found.append(row)
            continue
        kept = rationales if split == "train" else rationales[:1] or [""]
        without += not kept
        found += [{**row, "rationale": rationale} for rationale in kept]
    if without:
        warnings.warn(
            f"{without} of {len(rows)} questions {'has' if without == 1 else 'have'} no rationale, and "
            f"{'is' if without == 1 else 'are'} left out of training: there is no chain of thought to be trained.",
            stacklevel=2,
        )
    return found


SOURCES = {
    # The hub has no validation split of StrategyQA, and queries of the test split would be spent on choosing training rows.
    "strategy_qa": Source(folder="strategy_qa", hub="ChilleD/StrategyQA", train="train[:90%]", validation="train[90%:]", unfold=unfold),
    "commonsense_qa": Source(folder="commonsense_qa", hub="tau/commonsense_qa", unfold=unfold),
}


@dataclass(frozen=True)
class ChainOfThought(Prompted):
    """The family of questions with a chain of thought."""

    name: ClassVar[str] = "cot"

    def settled(self, data: DataSettings) -> DataSettings:
        """Fill in what is not said: StrategyQA, 256 tokens, the loss."""
        if data.columns is not None:
            raise ConfigError(
                "cot takes the columns question, choices, answer (or answerKey) and rationale as they are; leave --columns out."
            )
        return settled_prompts(data, task="strategy_qa", max_length=256)

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return the hyper-parameters of the published run: FLAN-T5, 20 epochs of 3e-4; others for a random start."""
        return {
            "model": None if preset else "google/flan-t5-base",
            "learning_rate": 1e-3 if preset else 3e-4,
            "weight_decay": 0.0,
            "num_train_epochs": 3.0 if preset else 20.0,
            "train_batch_size": 16 if preset else 8,
            "eval_batch_size": 32,
        }

    def source(self, data: DataSettings) -> Source:
        """Return where the data set lies; another task names a folder, or a data set on the hub."""
        task = str(data.task)
        return SOURCES.get(task, Source(folder=task, hub=task, unfold=unfold))

    def pair(self, row: Row, number: int, data: DataSettings) -> Pair:
        """Return the question, and the rationale with the answer; the row gets the question's id and the answer."""
        answer = _answer(row, number)
        name = next((str(row[key]) for key in _IDS if row.get(key) is not None), str(number))
        said = f"{_rationale(row, number)}\n{STEM} {answer}.".lstrip("\n")
        return Pair(prompt=_question(row, number), answer=said, more={"question": name, "answer": answer})

    def options(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> Options | None:
        """Return each possible answer of every row: after the question, without a rationale, only the answer's tokens trained."""
        length = int(data.max_length or 256)
        encoded, query, gold = [], [], []
        for number, row in enumerate(rows):
            prompt, true, answers = _question(row, number), _answer(row, number), _answers(row, number)
            if not answers:
                return None
            for answer in answers:
                pair = Pair(prompt=prompt, stem=STEM, answer=f" {answer}")
                encoded.append(encode_pair(tokenizer, config, pair, length, ends=False))
                query.append(number)
                gold.append(answer == true)
        return Options(rows=encoded, query=torch.tensor(query, dtype=torch.int64), gold=torch.tensor(gold, dtype=torch.bool))


def _question(row: Row, number: int) -> str:
    question = row.get("question")
    if not isinstance(question, str):
        raise DataError(f"row {number} has no text in 'question'; it has the columns {', '.join(map(str, row))}. {_EXPECTED}")
    choices = [text for _, text in _choices(row, number)]
    return f"{question}\n" + ("Options:\n" + "".join(f"- {text}\n" for text in choices) if choices else "")


def _choices(row: Row, number: int) -> list[tuple[str, str]]:
    """Return label and text of the choices; none: the row has none."""
    held = row.get("choices")
    if held is None:
        return []
    if isinstance(held, dict) and len(held.get("label", ())) == len(held.get("text", ())) > 0:
        return [(str(label), str(text)) for label, text in zip(held["label"], held["text"], strict=True)]
    if isinstance(held, list) and held:
        return [(str(place), str(text)) for place, text in enumerate(held)]
    raise DataError(f"row {number}: its choices are {held!r:.60}; give a list of texts, or lists under label and text of one length.")


def _answer(row: Row, number: int) -> str:
    """Return the answer as it is said."""
    choices, key = _choices(row, number), row.get("answerKey", row.get("answer"))
    if choices:
        return _chosen(row, number, choices, key)
    if isinstance(key, bool):
        return _TRUTH[key]
    if not isinstance(key, str | int | float):
        raise DataError(f"row {number} has no answer; it has the columns {', '.join(map(str, row))}. {_EXPECTED}")
    return str(key)


def _chosen(row: Row, number: int, choices: list[tuple[str, str]], key: Any) -> str:
    """Return the text of the choice that an answer names: by its text or label, or by its place in a list of texts without labels."""
    labels, said = dict(choices), str(key)
    by_label, by_text = labels.get(said), said if said in labels.values() else None
    listed = isinstance(row["choices"], list)
    if listed and isinstance(key, str) and by_text is not None:
        return by_text  # a number among texts that are numbers is one of them, not a place
    clear = listed and key not in row["choices"]  # a number that is no text can only be a place
    clear = clear or (not listed and row.get("answerKey") is not None)  # that column is of labels
    if by_label is not None and by_text is not None and by_label != by_text and not clear:
        raise DataError(
            f"row {number} has the answer {key!r}, which is a choice's text and another's {'place' if listed else 'label'}. "
            f"Give labels under label, and the true one under answerKey."
        )
    found = by_text if by_label is None else by_label
    if found is None:
        raise DataError(f"row {number} has the answer {key!r}, which is none of its choices ({', '.join(labels)}).")
    return found


def _answers(row: Row, number: int) -> list[str]:
    """Return all possible answers; none: they are free."""
    choices = [text for _, text in _choices(row, number)]
    free = not choices and _answer(row, number) not in _TRUTH.values()
    return [] if free else choices or list(_TRUTH.values())


def _rationale(row: Row, number: int) -> str:
    found = row.get("rationale", row.get("facts"))
    text = " ".join(map(str, found)) if isinstance(found, list) else found
    if not isinstance(text, str):
        raise DataError(f"row {number} has no rationale, so that there is no chain of thought to be trained. {_EXPECTED}")
    return text.strip()
