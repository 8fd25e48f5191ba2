"""Mask R-CNN with a small VAN on coins and galaxies: a minute on a CPU; both AP50 above 0.6.

    python tools/mm.py train configs/det/quickstart_mask-rcnn.py
    python tools/mm.py infer runs/mm/data/images/val/000.png --out runs/pictures \
        --config configs/det/quickstart_mask-rcnn.py \
        --checkpoint runs/mm/quickstart_mask-rcnn/epoch_16.pth
"""

_base_ = ["./_base_/mask_rcnn.py", "./_base_/quickstart.py"]

_norm = dict(norm_cfg=dict(type="BN"))
_proposals = dict(nms_pre=100, max_per_img=32)
# Images of 128 pixels with objects of 20 to 80: three levels, from stride 8 on.
_strides = [8, 16, 32]
_regions = dict(out_channels=64, featmap_strides=_strides)
model = dict(
    backbone=dict(name="van_b0", depths=(1, 1, 2, 1), out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 160, 256], out_channels=64, num_outs=3, **_norm),
    rpn_head=dict(
        in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=_strides)
    ),
    roi_head=dict(
        bbox_roi_extractor=_regions,
        mask_roi_extractor=_regions,
        bbox_head=dict(num_classes=2, in_channels=64, fc_out_channels=128),
        mask_head=dict(num_classes=2, in_channels=64, conv_out_channels=64, num_convs=2, **_norm),
    ),
    train_cfg=dict(rpn_proposal=_proposals, rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=_proposals),
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = dict(metric=["bbox", "segm"])
optim_wrapper = dict(optimizer=dict(lr=1e-3))
