"""Where verifiers run: threads for those that wait, processes that can be killed for those that compute."""
