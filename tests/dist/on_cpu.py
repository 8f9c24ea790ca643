"""Settles the device of the processes that import it, before they import Megatron: the server that ranks are forked from takes a
list of modules to import and nothing else."""

from rlx.processes.device import take_device

take_device("cpu", 0)
