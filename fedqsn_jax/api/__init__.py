"""`federate`: the one call for a model and rows of a user's own."""
