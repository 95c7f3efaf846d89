"""Reports: one self-contained page that shows what a run found."""
