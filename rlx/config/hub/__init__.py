"""Models and data sets of the Hugging Face hub by their ids, as local paths."""
