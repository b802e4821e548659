"""Language models of the families that Hugging Face names, read from and written to its files."""
