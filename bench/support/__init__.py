"""What the comparisons in the folder above share; each of those is a script to run."""
