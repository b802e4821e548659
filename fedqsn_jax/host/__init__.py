"""The machine that a command runs on: signals, processes, devices, the console, files, checkpoints.

It knows nothing of the method; the mathematics never imports it.
"""
