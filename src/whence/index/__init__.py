"""The gradient index: one small row per training example, so that a new query needs no pass over the training data."""
