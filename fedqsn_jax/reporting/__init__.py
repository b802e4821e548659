"""What users see of a run: tables, progress, pictures, summaries, metrics on disk.

It is given numbers and knows nothing of how they came about.
"""
