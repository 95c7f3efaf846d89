"""From a forward and a backward pass to the pair (a, g) of every tracked layer."""
