"""Semantic FPN with a small VAN on coins and galaxies: a minute on a CPU; mIoU above 80.

    python tools/mm.py train configs/seg/quickstart_fpn.py
    python tools/mm.py infer runs/mm/data/images/val/000.png --out runs/pictures \
        --config configs/seg/quickstart_fpn.py --checkpoint runs/mm/quickstart_fpn/iter_160.pth
"""

_base_ = ["./_base_/fpn.py", "./_base_/quickstart.py"]

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(name="van_b0", depths=(1, 1, 2, 1)),
    neck=dict(in_channels=[32, 64, 160, 256], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        num_classes=3,
        # Galaxies are few and small.
        loss_decode=dict(class_weight=[0.5, 1.0, 3.0]),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
