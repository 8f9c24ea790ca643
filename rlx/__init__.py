"""rlx: reinforcement-learning post-training for language models at cluster scale."""

__version__ = "0.1.0"
