"""UPerNet with a small VAN on coins and galaxies: a minute on a CPU; mIoU above 80.

    python tools/mm.py train configs/seg/quickstart_upernet.py
    python tools/mm.py infer runs/mm/data/images/val/000.png --out runs/pictures \
        --config configs/seg/quickstart_upernet.py \
        --checkpoint runs/mm/quickstart_upernet/iter_160.pth
"""

_base_ = ["./_base_/upernet.py", "./_base_/quickstart.py"]

# Galaxies are few and small.
_head = dict(channels=64, num_classes=3, loss_decode=dict(class_weight=[0.5, 1.0, 3.0]))
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(name="van_b0", depths=(1, 1, 2, 1)),
    decode_head=dict(in_channels=[32, 64, 160, 256], **_head),
    auxiliary_head=dict(in_channels=160, **_head),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, by_epoch=False)]
