"""The commands' bodies: what `python -m fedqsn_jax.main` and the others do."""
