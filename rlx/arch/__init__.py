"""From a model's config.json to its architecture, one family a file: fields, shape, weight table. Knows no torch."""
