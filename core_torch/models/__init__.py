"""Models: wiring of layers, one file each."""
