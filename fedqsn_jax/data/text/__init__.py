"""Rows of text: sources, formats, tokenization, packing, and the cache of tokenized rows."""
