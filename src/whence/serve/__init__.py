"""A local page on which an index is asked, and its JSON routes."""
