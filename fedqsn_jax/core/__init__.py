"""Words that all folders share: arrays and keys, trees of parameters, tasks.

It knows nothing of federated learning, of files or of configurations.
"""
