"""Mask R-CNN with a small VAN on coins: under two minutes on a CPU; box and mask AP50 above 0.5.

    python tools/make_mm_quickstart.py --out runs/quickstart
    python tools/train_mm.py configs/det/quickstart_mask-rcnn.py
    python tools/infer_mm.py runs/quickstart/images/val/000.png --out runs/pictures \
        --config configs/det/quickstart_mask-rcnn.py \
        --checkpoint runs/mm/quickstart_mask-rcnn/epoch_10.pth
"""

_base_ = ["./_base_/mask_rcnn.py", "./_base_/quickstart.py"]

_norm = dict(norm_cfg=dict(type="BN"))
_proposals = dict(nms_pre=200, max_per_img=64)
model = dict(
    backbone=dict(name="van_b0", depths=(1, 1, 2, 1)),
    neck=dict(in_channels=[32, 64, 160, 256], out_channels=64, **_norm),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        mask_roi_extractor=dict(out_channels=64),
        bbox_head=dict(num_classes=1, in_channels=64, fc_out_channels=128),
        mask_head=dict(num_classes=1, in_channels=64, conv_out_channels=64, num_convs=2, **_norm),
    ),
    train_cfg=dict(rpn_proposal=_proposals, rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=_proposals),
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = dict(metric=["bbox", "segm"])
optim_wrapper = dict(optimizer=dict(lr=1e-3))
