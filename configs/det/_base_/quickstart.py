"""Coins and galaxies in COCO's format, created if missing."""

_base_ = ["./runtime.py"]

data_root = "runs/mm/data/"
quickstart_data = dict(folder=data_root, train=64, val=12)
_dataset = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=("coin", "galaxy")))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **_dataset,
        ann_file="train.json",
        data_prefix=dict(img="images/train/"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **_dataset,
        ann_file="val.json",
        data_prefix=dict(img="images/val/"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(128, 128)),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "val.json", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=16, val_interval=16)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(interval=8), checkpoint=dict(interval=8, save_best=None, max_keep_ckpts=2)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=16),
    dict(type="CosineAnnealingLR", T_max=240, eta_min=1e-5, by_epoch=False, begin=16, end=256),
]
randomness = dict(seed=0)
