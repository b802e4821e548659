"""Converters that users run: ``python -m fedqsn_jax.tools.NAME``. Nothing imports them."""
