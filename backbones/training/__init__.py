"""Implementation of ``train_cls.py``; not imported by ``import backbones``."""
