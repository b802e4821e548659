"""A run and its directory: what is written, resumed, loaded and told.

`experiment` is the main job, `working_directory` the directory's files. It knows nothing of the
command line, nor of how a round is computed.
"""
