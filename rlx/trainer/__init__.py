"""The training loop and the rank-side worker."""
