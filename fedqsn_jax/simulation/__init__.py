"""All parties of a federation in one process: composed, scheduled, measured and run.

`from_config` and `compose` turn a configuration and a problem into a method and its rounds, and
`running` runs them. It writes no files.
"""
