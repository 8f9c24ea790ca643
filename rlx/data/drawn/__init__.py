"""Tasks about pictures that are drawn from a seed: one task a file, the table of them in ``table.py``."""
