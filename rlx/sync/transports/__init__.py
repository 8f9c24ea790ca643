"""The ways weights travel to engines, one a file."""
