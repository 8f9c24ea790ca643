"""Hugging Face folders: reading, writing, and rows of weights as tensors."""
