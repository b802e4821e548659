"""`federate`: the one call for a user's own model and rows.

It checks what a user brings, and makes of it a problem and a run as the main job has them. It knows
nothing of files of configurations or of the command line.
"""
