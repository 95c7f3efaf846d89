"""Which words of which training sentences a classifier's answer comes from, and what better solvers change.

    python examples/02_tokens_and_solvers.py

Takes a few seconds: sentences of made-up reviews, a network with embeddings; every tenth training label is wrong.
"""

import random

import torch
from torch import Tensor, nn

import whence

# 1. Data: sentences of two to seven words; what decides is one word of praise or blame among the others. 0 is padding.
PLAIN = ["the", "film", "plot", "cast", "music", "was", "with", "a", "long", "and", "some", "of"]
PRAISE, BLAME = ["lovely", "great", "witty"], ["dull", "awful", "flat"]
WORDS = ["", *PLAIN, *PRAISE, *BLAME]
draw = random.Random(0)


def review(wrong: bool) -> dict:
    label = draw.randrange(2)
    words = [draw.choice(PLAIN) for _ in range(draw.randrange(1, 7))]
    words.insert(draw.randrange(len(words) + 1), draw.choice(PRAISE if label else BLAME))
    ids = [WORDS.index(word) for word in words]
    return {"inputs": {"input_ids": torch.tensor(ids + [0] * (7 - len(ids)))}, "labels": label ^ wrong}


train, test = [review(wrong=n % 10 == 0) for n in range(400)], [review(wrong=False) for _ in range(20)]


# 2. A model, trained, and its task: the padding mask says which positions are words.
class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(len(WORDS), 8, padding_idx=0), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        real = (input_ids != 0).unsqueeze(-1)
        return self.head((torch.tanh(self.hidden(self.words(input_ids))) * real).sum(1))


class Reviews(whence.tasks.Classification):
    def padding_mask(self, batch: dict) -> Tensor:
        return batch["inputs"]["input_ids"] != 0


torch.manual_seed(0)
model, task = Reader(), Reviews(inputs="inputs", labels="labels", measurement="margin")
everything = torch.utils.data.default_collate(train)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    task.loss(model, everything).mean().backward()
    optimizer.step()

# 3. Scores by token: positive words helped the test answer, negative ones harmed it.
attributor = whence.Attributor(model, task, layers="all", progress=False).fit(train, strategy="ekfac")
scores = attributor.scores(test, train, damping=whence.Damping(relative=1.0, scope="model"), per_token=True)


def text(row: dict) -> list[str]:
    return [WORDS[i] for i in row["inputs"]["input_ids"].tolist() if i]


print("test review:", " ".join(text(test[1])))
for side, rows in (("helped", scores.top(1, 2)), ("harmed", scores.bottom(1, 2))):
    for row, score in rows:
        parts = scores.per_token[1, row].tolist()
        words = " ".join(f"{word}({part:+.1f})" for word, part in zip(text(train[row]), parts, strict=False))
        print(f"{side} by row {row:3d}, labelled {['bad', 'good'][train[row]['labels']]}, {score:+.1f}: {words}")

# Every row's tokens, and what belongs to none of them (the head sees the sum), make up its score.
assert torch.allclose(scores.per_token.sum(-1) + scores.per_token_rest, scores.values, atol=1e-4)

# 4. Solvers: the same question to the Gauss-Newton matrix itself, by conjugate gradients and exactly.
few = whence.ConjugateGradients(iterations=10)
found = {
    "direct": attributor.scores(test, train, damping=whence.Damping(relative=3.0, scope="model"), name="direct").values,
    "cg": attributor.scores(test, train, solver=few).values,
    "exact": attributor.scores(test, train, solver="exact").values,
}
for name, values in found.items():
    agreement = torch.corrcoef(torch.stack([values.flatten(), found["exact"].flatten()]))[0, 1]
    print(f"{name}: correlation {agreement:.3f} with the exact inverse")

# 5. Wrong labels: rows whose training harmed the test answers most, all queries together.
harm = attributor.scores(test, train, aggregate="queries", name="harm").bottom(0, 20)
print(f"of the 20 rows that harmed most, {sum(row % 10 == 0 for row, _ in harm)} have a wrong label (40 of 400 have)")
