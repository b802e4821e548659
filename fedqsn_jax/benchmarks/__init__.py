"""How long rounds take and what they hold: workloads, timing, traces of a device."""
