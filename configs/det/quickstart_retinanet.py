"""RetinaNet with a small VAN on coins and galaxies: a minute on a CPU; box AP50 above 0.6.

    python tools/mm.py train configs/det/quickstart_retinanet.py
    python tools/mm.py infer runs/mm/data/images/val/000.png --out runs/pictures \
        --config configs/det/quickstart_retinanet.py \
        --checkpoint runs/mm/quickstart_retinanet/epoch_16.pth
"""

_base_ = ["./_base_/retinanet.py", "./_base_/quickstart.py"]

_norm = dict(norm_cfg=dict(type="BN"))
model = dict(
    backbone=dict(name="van_b0", depths=(1, 1, 2, 1)),
    # Images of 128 pixels have no use for the levels at strides 64 and 128.
    neck=dict(in_channels=[32, 64, 160, 256], out_channels=64, num_outs=3, **_norm),
    bbox_head=dict(
        num_classes=2,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(strides=[8, 16, 32]),
        **_norm,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.01))
