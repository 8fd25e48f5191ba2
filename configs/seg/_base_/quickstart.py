"""Coins and galaxies in mmseg's layout, created if missing."""

_base_ = ["./runtime.py"]

data_root = "runs/mm/data/"
quickstart_data = dict(folder=data_root, train=64, val=12)
_dataset = dict(
    type="BaseSegDataset",
    metainfo=dict(
        classes=("background", "coin", "galaxy"),
        palette=[[0, 0, 0], [255, 200, 0], [0, 160, 255]],
    ),
    data_root=data_root,
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=False,
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **_dataset,
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **_dataset,
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160, val_interval=160)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(interval=8), checkpoint=dict(interval=80, save_best=None, max_keep_ckpts=2)
)
randomness = dict(seed=0)
