"""Process groups, schedules, vocabulary-parallel log-probs, context-parallel layout, optimizer, the CPU backend.

Importing this package prepares the process for Megatron: without a visible GPU, Megatron's CUDA calls are
answered by the CPU backend, which must be in place before the first of them is made.
"""

import torch

from rlx.parallel import cpu_backend

if not torch.cuda.is_available():
    cpu_backend.install()
