"""Whether a publication arrived: scores of the engines against the trainer's, and their tensors, handed out or summed up."""
