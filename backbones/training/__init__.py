"""What ``train_cls.py`` is made of; never imported by ``import backbones``."""
