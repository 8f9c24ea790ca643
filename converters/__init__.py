"""Converts Hugging Face checkpoints to Megatron distributed checkpoints and back, on a CPU, tensor by tensor."""
