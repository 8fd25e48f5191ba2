"""Features of many images: computed, kept in tables, read again."""
