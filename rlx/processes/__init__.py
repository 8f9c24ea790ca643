"""Children, the first failure among them, signals, orphans: what every launcher and every engine's owner needs."""
