"""The paper: mask sites, masks, quantizers, proxies, updates, and their bytes on the wire.

Pure functions of keys, states and arrays. It never imports config, host or reporting.
"""
