"""UPerNet as published with NAT and DiNAT, for crops of 640×640."""

_base_ = ["./upernet_nat.py"]

model = dict(data_preprocessor=dict(size=(640, 640)))
