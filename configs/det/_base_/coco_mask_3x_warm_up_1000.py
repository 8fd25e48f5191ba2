"""COCO 2017 boxes and masks, 36 epochs, a warm-up of 1000 iterations instead of 500."""

_base_ = ["./coco_mask_3x.py"]

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
