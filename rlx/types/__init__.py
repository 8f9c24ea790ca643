"""The vocabulary: every value that crosses a package border, and nothing else. It knows no Megatron, no SGLang and no files."""
