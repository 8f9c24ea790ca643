"""Engine processes: started, watched, replaced, and the list of those that serve."""
