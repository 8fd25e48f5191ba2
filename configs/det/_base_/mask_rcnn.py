"""Mask R-CNN: region proposals, then boxes and masks of each; AdamW 1e-4, decay 0.05.

He et al., "Mask R-CNN", https://arxiv.org/abs/1703.06870.
"""

_base_ = ["./rpn.py"]

_stage = dict(
    assigner=dict(
        type="MaxIoUAssigner",
        pos_iou_thr=0.5,
        neg_iou_thr=0.5,
        min_pos_iou=0.5,
        match_low_quality=True,
    ),
    sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25, add_gt_as_proposals=True),
    mask_size=28,
    pos_weight=-1,
)
model = dict(
    type="MaskRCNN",
    roi_head=dict(
        type="StandardRoIHead",
        bbox_head=dict(
            type="Shared2FCBBoxHead",
            in_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type="CrossEntropyLoss"),
            loss_bbox=dict(type="L1Loss"),
        ),
    ),
    train_cfg=dict(rcnn=_stage),
)
