"""What ``fuse()`` does to models."""
