"""Publishing the trainer's weights to the engines: chunks in, every engine updated and verified."""
