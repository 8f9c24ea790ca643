"""Megatron models from Hugging Face folders: architecture, layers, weight-name tables, reading and writing."""
