"""Series of training runs, with tables and pictures of their results."""
