"""A small medical set of two classes in mmseg's layout, for example polyps or skin lesions.

``data/medical/{images,masks}/{train,val}``: pictures, and PNG masks of the same name with 0 for
background and 1 for the lesion.
"""

_base_ = ["./runtime.py"]

crop_size = (256, 256)
_dataset = dict(
    type="BaseSegDataset",
    metainfo=dict(classes=("background", "lesion"), palette=[[0, 0, 0], [255, 64, 64]]),
    data_root="data/medical",
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=False,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **_dataset,
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=(1024, 256), ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.9),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **_dataset,
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(1024, 256), keep_ratio=True),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU", "mDice"])
test_evaluator = val_evaluator
