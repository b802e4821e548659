"""What a user may set: the fields, their allowed values, and how files and flags are read.

It knows nothing of JAX. Configuration files import what they need from here.
"""

from fedqsn_jax.config.schema import ConfigError, as_released, default_config

__all__ = ["ConfigError", "as_released", "default_config"]
