"""Sweeps: many settings of a configuration, in as few compiled programs as possible."""
