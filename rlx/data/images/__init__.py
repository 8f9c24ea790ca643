"""Images: their files, their pixels, their places among tokens."""
