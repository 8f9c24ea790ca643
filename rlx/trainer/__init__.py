"""A trainer rank's part: its models, the batch it holds, scores and updates."""
