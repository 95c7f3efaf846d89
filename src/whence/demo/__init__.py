"""The demos: each trains a model on this machine from data that is there, explains it, and writes a page."""
