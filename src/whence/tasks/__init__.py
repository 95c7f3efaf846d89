"""What a model is trained on and what is to be explained: loss, measurement, label sampling, padding.

A task is the only thing a user writes for an unusual model. All losses and measurements are one number per
example, summed over the example's tokens.

Plain modules: `Classification`, `Regression`. Hugging Face models: `SequenceClassification`, `TokenClassification`,
`MultipleChoice`, `CausalLM`, `Seq2SeqLM`. Anything else: a subclass of `Task`.
"""

from __future__ import annotations

from whence.tasks.base import Masks, Noise, Task, check_model_and_task
from whence.tasks.classifiers import MultipleChoice, SequenceClassification, TokenClassification
from whence.tasks.language import CausalLM, Seq2SeqLM
from whence.tasks.supervised import Classification, Regression

__all__ = [
    "CausalLM",
    "Classification",
    "Masks",
    "MultipleChoice",
    "Noise",
    "Regression",
    "Seq2SeqLM",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "check_model_and_task",
]
