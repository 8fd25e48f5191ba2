"""The engine of ``fuse()``: a call is recorded, proved, rewritten, and replayed."""
