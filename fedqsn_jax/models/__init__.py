"""Networks, and the adapters that turn Flax modules into pure functions.

They know nothing of masks, clients or rounds.
"""
