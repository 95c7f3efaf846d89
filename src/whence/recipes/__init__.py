"""Recipes: a model, its task and its data under one name, for the command line and for reports."""
