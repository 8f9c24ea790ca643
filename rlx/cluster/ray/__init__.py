"""Runs on a Ray cluster: trainer ranks and engines as actors."""
