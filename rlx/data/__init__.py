"""Prompts, chat templates, training samples, batch plans and packing."""
