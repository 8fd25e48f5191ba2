"""Images of any source: opened by its name, split and column, in order or at random."""
