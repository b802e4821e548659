"""A round: the client's training, the client axis, aggregation, the views, and their evaluation.

`method` says what a method is made of, `federation` composes a round of it, `client` trains one
client. Pure functions. It never imports config, host or reporting.
"""
