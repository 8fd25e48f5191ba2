"""ADE20K; in evaluation, sides are enlarged to multiples of 32."""

_base_ = ["./ade20k.py"]

_load_test = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=_load_test))
test_dataloader = dict(dataset=dict(pipeline=_load_test))
