"""Networks, and Flax modules as pure functions of parameters, rows and a key.

They know nothing of masks, clients or rounds.
"""
