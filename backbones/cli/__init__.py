"""The `vision-backbones` command; `import backbones` does not import it."""
