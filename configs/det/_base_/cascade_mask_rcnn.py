"""Cascade Mask R-CNN: three box heads at rising overlaps, one mask branch each; AdamW.

Cai and Vasconcelos, "Cascade R-CNN", https://arxiv.org/abs/1712.00726. The box heads have four
convolutions and one linear layer, as in the detectors of the papers that use this base.
"""

_base_ = ["./rpn.py"]

_heads = [
    dict(
        type="ConvFCBBoxHead",
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=stds),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        loss_cls=dict(type="CrossEntropyLoss"),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]
_stages = [
    dict(
        assigner=dict(
            type="MaxIoUAssigner",
            pos_iou_thr=overlap,
            neg_iou_thr=overlap,
            min_pos_iou=overlap,
            match_low_quality=False,
        ),
        sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25, add_gt_as_proposals=True),
        mask_size=28,
        pos_weight=-1,
    )
    for overlap in (0.5, 0.6, 0.7)
]
model = dict(
    type="CascadeRCNN",
    rpn_head=dict(loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=1 / 9)),
    roi_head=dict(
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=_heads,
    ),
    train_cfg=dict(rpn=dict(allowed_border=0), rpn_proposal=dict(max_per_img=2000), rcnn=_stages),
)
