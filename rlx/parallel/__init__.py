"""Process groups, schedules, vocabulary-parallel log-probs, context-parallel layout, optimizer, the CPU backend."""
