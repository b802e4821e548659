"""Rows of the server and of the clients: where they come from, and how they are dealt.

It knows nothing of models or methods.
"""
