"""UPerNet with layer-wise learning rates, for crops of 640×640."""

_base_ = ["./upernet_decay.py"]

model = dict(data_preprocessor=dict(size=(640, 640)))
