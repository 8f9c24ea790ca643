"""Metrics, timers, log and trackers."""
