"""SGLang over HTTP and as a process: client, control, server, and what runs inside it to receive weights."""
