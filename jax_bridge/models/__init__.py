"""Models: wiring of layers."""
