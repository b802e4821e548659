"""Real parties: a server and clients as programs of their own, which Flower connects.

The server's side makes payloads of the simulation's pure functions and folds updates in; the
client's side decodes, trains and encodes, and never imports what knows the server's state.
"""
