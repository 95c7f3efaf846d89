"""Influence scores: pairwise, self-influence, and the matrix that holds them."""
