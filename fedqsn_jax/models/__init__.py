"""Models, and the adapters that make pure functions of them."""
