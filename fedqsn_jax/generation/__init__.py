"""Texts that a model writes: beam search, tasks and scores of language models.

It is given functions and parameters, and knows nothing of configurations or of runs.
"""
