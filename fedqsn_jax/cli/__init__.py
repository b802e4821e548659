"""The commands' bodies: what ``python -m fedqsn_jax.main`` and the others do.

They read options and show results; what they run is in the folders before them. Modules of the
commands' names at the top of the package call them.
"""
