"""Advantages and losses as pure tensor functions: no process groups, no models, one algorithm a file."""
