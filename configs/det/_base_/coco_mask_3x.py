"""COCO 2017 boxes and masks, 36 epochs, short side 480 … 800 with or without a crop before it."""

_base_ = ["./coco_mask_1x.py"]

sides = [(1333, side) for side in range(480, 801, 32)]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(
                type="RandomChoice",
                transforms=[
                    [dict(type="RandomChoiceResize", scales=sides, keep_ratio=True)],
                    [
                        dict(
                            type="RandomChoiceResize",
                            scales=[(1333, 400), (1333, 500), (1333, 600)],
                            keep_ratio=True,
                        ),
                        dict(
                            type="RandomCrop",
                            crop_type="absolute_range",
                            crop_size=(384, 600),
                            allow_negative_crop=True,
                        ),
                        dict(type="RandomChoiceResize", scales=sides, keep_ratio=True),
                    ],
                ],
            ),
            dict(type="PackDetInputs"),
        ]
    )
)
train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
