"""UPerNet: pyramid pooling and a feature pyramid, with an auxiliary head; AdamW 6e-5, decay 0.01.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding",
https://arxiv.org/abs/1807.10221. The rate warms up for 1500 iterations and then falls linearly.
"""

_head = dict(
    num_classes=150,
    dropout_ratio=0.1,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    align_corners=False,
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(type="VisionBackbone"),
    decode_head=dict(
        type="UPerHead",
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        loss_decode=dict(type="CrossEntropyLoss"),
        **_head,
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
        **_head,
    ),
    train_cfg={},
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, by_epoch=False),
]
