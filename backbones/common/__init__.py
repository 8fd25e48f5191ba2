"""The floor that everything stands on: files, errors, messages, progress, memory, images."""
