"""The `vision-backbones` command; the library is `backbones`, imported once it is needed."""
