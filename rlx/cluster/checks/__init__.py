"""What a launcher looks at before it starts anything, by subject; ``rlx.cluster.preflight`` calls all of it."""
