"""SGLang over HTTP and as a process: client, control, server, and what runs inside it to receive weights."""

# The oldest and the newest release that the tests pass with; setup.py allows what lies between.
TESTED = ("0.5.15.post1", "0.5.23")
