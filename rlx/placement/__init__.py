"""Who sits where: roles to nodes and GPUs. Pure functions; nothing is started."""
