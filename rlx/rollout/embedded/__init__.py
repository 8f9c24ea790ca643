"""The embedded engine: a Hugging Face causal model that speaks SGLang's HTTP protocol, on one CPU or GPU."""
