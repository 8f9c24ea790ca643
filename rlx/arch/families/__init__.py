"""One model family a file: which fields of config.json it knows, its architecture, its weight table."""
