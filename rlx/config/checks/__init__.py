"""What no single key can say: keys that contradict each other, and keys that change nothing in this run."""
