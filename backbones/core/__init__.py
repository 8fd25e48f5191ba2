"""What all families share: registry, base class, checkpoints, fusing, and the words of messages."""
