"""Where processes live: start them, watch them, end them, and say which one failed first."""
