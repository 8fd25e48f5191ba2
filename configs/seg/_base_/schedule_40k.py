"""40 000 iterations, polynomial decay."""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=8000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
