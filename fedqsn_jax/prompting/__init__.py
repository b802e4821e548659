"""FedSP: soft prompts that clients tune for a model that they never get.

Pure functions. It never imports config, host or reporting.
"""
