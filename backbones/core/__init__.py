"""What all families share: registry, base classes, checkpoints."""
