"""Series of runs, their tables and pictures."""
