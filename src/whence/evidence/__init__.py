"""Evidence for and against scores: comparisons on one recipe, and what acting on them buys."""
