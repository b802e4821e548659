"""GPU kernels beside plain JAX that computes the same.

They never import config, host or reporting.
"""
