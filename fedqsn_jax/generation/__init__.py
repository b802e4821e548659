"""Texts that a model writes: beam search, tasks and scores of language models."""
