"""How long rounds take and what they hold: workloads, timing, traces of a device.

It measures what `simulation` composes and is imported by nothing but the command. The figures are
in its Markdown files.
"""
