"""Influence scores in five lines: which training digits help or harm a network on test digits.

    python examples/01_five_lines.py

Takes a few seconds: 800 of scikit-learn's handwritten digits (8 x 8 pixels), a network with one hidden layer.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import whence

# A trained model and its data; use your own here.
torch.manual_seed(0)
digits = load_digits()
pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train, test = list(zip(pixels[:800], labels[:800], strict=True)), list(zip(pixels[800:820], labels[800:820], strict=True))
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(pixels[:800]), labels[:800]).backward()
    optimizer.step()

# The five lines.
attributor = whence.Attributor(model, whence.tasks.Classification())
attributor.fit(train, strategy="ekfac")
scores = attributor.scores(test, train)
for row, score in scores.top(query=0, k=5):
    print(f"test digit {test[0][1]}: training row {row:3d}, a {train[row][1]}, score {score:+.4f}")

unusual = attributor.self_influence(train).argsort(descending=True)[:5]
print("most unusual training rows:", unusual.tolist())
