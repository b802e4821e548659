"""A round: the client's training, the client axis, aggregation, the views, and their evaluation.

Pure functions. It never imports config, host or reporting.
"""
