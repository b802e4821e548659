"""A run and its directory: what is written, resumed, loaded and told."""
