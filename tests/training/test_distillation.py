"""Distillation: losses against their formulas, exits, resumed runs."""

import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from training_runs import MODEL_ARGS, a_few, make_images, same
from zoo import CLASSIFIERS, SMALL, small

import backbones
from backbones.common.errors import RecipeError
from backbones.training.build import build_objective
from backbones.training.distillation import (
    Exit,
    Objective,
    StudentWithExits,
    Teacher,
    build_teacher,
    hard_label_loss,
    ofa_loss,
    soft_label_loss,
)
from backbones.training.optimization import build_optimizer
from backbones.training.recipe import Recipe

CONFIG = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AS_IS = ((0.0,) * 3, (1.0,) * 3)


def naive_ofa(student, teacher, label, gamma, temperature):
    """Equation 4 of the paper for one image, class by class."""
    p_student = [math.exp(z / temperature) for z in student.tolist()]
    p_teacher = [math.exp(z / temperature) for z in teacher.tolist()]
    p_student = [p / sum(p_student) for p in p_student]
    p_teacher = [p / sum(p_teacher) for p in p_teacher]
    loss = -((1 + p_teacher[label]) ** gamma) * math.log(p_student[label])
    for c in range(len(p_student)):
        if c != label:
            loss -= p_teacher[c] * math.log(p_student[c])
    return loss * temperature**2


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) * 2
    return student.requires_grad_(), teacher, torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_one_for_all_follows_its_formula(gamma, temperature, logits):
    student, teacher, labels = logits
    wanted = [
        naive_ofa(s, t, y, gamma, temperature)
        for s, t, y in zip(student, teacher, labels.tolist(), strict=True)
    ]
    loss = ofa_loss(student, teacher, labels, gamma, temperature)
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)
    torch.autograd.gradcheck(
        lambda s: ofa_loss(s, teacher, labels, gamma, temperature), student, raise_exception=True
    )


def test_one_for_all_of_mixed_labels_is_the_mean_of_both(logits):
    student, teacher, labels = logits
    other = labels.flip(0)
    mixed = 0.3 * F.one_hot(labels, 5) + 0.7 * F.one_hot(other, 5)
    wanted = 0.3 * ofa_loss(student, teacher, labels, 1.5)
    wanted += 0.7 * ofa_loss(student, teacher, other, 1.5)
    torch.testing.assert_close(ofa_loss(student, teacher, mixed, 1.5), wanted, check_dtype=False)


def test_soft_labels(logits):
    student, teacher, _ = logits
    p, q = (student / 3).softmax(1), (teacher / 3).softmax(1)
    wanted = 9 * (q * (q.log() - p.log())).sum(1).mean()
    torch.testing.assert_close(soft_label_loss(student, teacher, 3.0), wanted)
    assert soft_label_loss(teacher, teacher, 3.0).abs() < 1e-12
    torch.autograd.gradcheck(lambda s: soft_label_loss(s, teacher, 3.0), student)


def test_hard_labels(logits):
    student, teacher, _ = logits
    wanted = -student.log_softmax(1)[torch.arange(6), teacher.max(1).indices].mean()
    torch.testing.assert_close(hard_label_loss(student, teacher), wanted)


@pytest.mark.parametrize("kind", ["soft", "hard", "ofa"])
def test_the_whole_loss(kind):
    student = small("van", num_classes=3).eval()
    network = StudentWithExits(student, (0, -1)).eval() if kind == "ofa" else student
    teacher = Teacher(small("shvit", num_classes=3), AS_IS, AS_IS, None)
    recipe = Recipe(distill=kind, distill_alpha=0.3, distill_temperature=2.0, ofa_gamma=1.5)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    loss, logits = Objective(F.cross_entropy, recipe, teacher)(network, images, labels)
    wisdom = teacher.network(images)
    torch.testing.assert_close(logits, student(images))
    learnt = {
        "soft": lambda: soft_label_loss(logits, wisdom, 2.0),
        "hard": lambda: hard_label_loss(logits, wisdom),
        "ofa": lambda: sum(
            ofa_loss(answer, wisdom, labels, 1.5, 2.0) for answer in (logits, *network(images)[1])
        ),
    }[kind]()
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(logits, labels) + 0.3 * learnt)
    label_loss, same_logits = Objective(F.cross_entropy, Recipe())(student, images, labels)
    torch.testing.assert_close(label_loss, F.cross_entropy(same_logits, labels))


@pytest.mark.parametrize("kind", [None, "soft", "hard"])
def test_an_auxiliary_head(kind):
    """Learns the labels with a weight of its own, and nothing from a teacher."""
    student = small("overlock", num_classes=3)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    answers = student(images)
    if kind is None:
        recipe = Recipe(aux_weight=0.3, smoothing=0.0)
        objective = build_objective(recipe, 3, {}, False, torch.device("cpu"))
    else:
        teacher = Teacher(small("shvit", num_classes=3), AS_IS, AS_IS, None)
        recipe = Recipe(distill=kind, distill_alpha=0.0, aux_weight=0.3)
        objective = Objective(F.cross_entropy, recipe, teacher)
    loss, logits = objective(lambda images: answers, images, labels)
    torch.testing.assert_close(logits, answers[0])
    own, auxiliary = (F.cross_entropy(answer, labels) for answer in answers)
    torch.testing.assert_close(loss, own + 0.3 * auxiliary)


@pytest.mark.parametrize("family", a_few(CLASSIFIERS))
def test_every_family_can_have_exits(family):
    student = small(family, num_classes=4)
    network = StudentWithExits(student)
    images = torch.randn(2, 3, 64, 64)
    logits, branches = network(images)
    assert [tuple(branch.shape) for branch in branches] == [(2, 4)] * len(student.stages)
    (logits.sum() + sum(branch.square().sum() for branch in branches)).backward()
    for name, parameter in network.exits.named_parameters():
        assert parameter.grad is not None, name
    first_block = next(student.stages[0].blocks.parameters())
    assert first_block.grad is not None
    network.eval()
    torch.testing.assert_close(network(images)[0], student(images))


def test_the_optimizer_trains_the_exits():
    recipe = Recipe(weight_decay=0.3, layer_decay=0.5)
    network = StudentWithExits(small("van", num_classes=3))
    optimizer = build_optimizer(recipe, network, 1e-3)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert groups.keys() == {id(p) for p in network.parameters()}
    for name, parameter in network.exits.named_parameters():
        assert groups[id(parameter)]["weight_decay"] == (0.3 if parameter.ndim > 1 else 0), name
        assert groups[id(parameter)]["lr"] == 1e-3


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_the_teacher_gets_its_own_normalisation():
    """Its own normalisation and size, whatever the student's are."""
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(CONFIG[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    teacher = Teacher(Mean(), (CONFIG["mean"], CONFIG["std"]), ((0.5,) * 3, (0.25,) * 3), None)
    seen = teacher((pixels - mean) / std)
    torch.testing.assert_close(seen, ((pixels - 0.5) / 0.25).mean((2, 3)))
    sizes = []
    network = torch.nn.Identity()
    network.register_forward_hook(lambda _m, inputs, _o: sizes.append(inputs[0].shape[-1]))
    Teacher(network, AS_IS, AS_IS, 12)(pixels)
    assert sizes == [12]


def test_a_teacher_does_not_learn():
    teacher = Teacher(small("van", num_classes=3), AS_IS, AS_IS, None)
    teacher.train()
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.randn(1, 3, 32, 32)).requires_grad


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 7})


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Weights of an own teacher and of one that timm has."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(1)
    own = small("biformer", num_classes=3)
    torch.save(own.state_dict(), folder / "own.pth")
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), folder / "timm.pth")
    return folder


_NAME, _ARGUMENTS = SMALL["biformer"]
OWN = [f"--teacher={_NAME}", f"--teacher-args={json.dumps(_ARGUMENTS)}"]


def test_teachers_of_timm_and_their_size(teachers, tmp_path):
    path = str(teachers / "timm.pth")
    teacher = build_teacher(Recipe(teacher="test_vit", teacher_checkpoint=path), 3, CONFIG)
    own = timm.create_model("test_vit").pretrained_cfg
    assert teacher.img_size == own["input_size"][-1] and own["std"] != CONFIG["std"]
    deviations = torch.tensor(CONFIG["std"]) / torch.tensor(own["std"])
    torch.testing.assert_close(teacher.scale.flatten(), deviations)
    recipe = Recipe(teacher="test_vit", teacher_checkpoint=path, teacher_img_size=24)
    assert build_teacher(recipe, 3, CONFIG).img_size == 24
    weights = torch.load(path, weights_only=True)
    assert same(dict(teacher.network.state_dict()), dict(weights))
    assert teacher(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    grey = timm.create_model("test_vit", num_classes=3, in_chans=1)
    torch.save(grey.state_dict(), path := str(tmp_path / "grey.pth"))
    recipe = Recipe(teacher="test_vit", teacher_checkpoint=path, in_chans=1)
    teacher = build_teacher(recipe, 3, {"mean": (0.5,), "std": (0.25,)})
    assert teacher(torch.randn(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distill=soft"], "needs a teacher and its weights"),
        (["--distill=soft", "--teacher=van_b0"], "needs a teacher and its weights"),
        (["--teacher=van_b0"], "needs distill"),
        (["--distill=ofa", "--ofa-gamma=0.5", *OWN, "--teacher-checkpoint=x"], "ofa_gamma must be"),
        (["--distill=soft", *OWN, "--teacher-checkpoint=x"], "no checkpoint at x"),
        (["--distill=soft", "--teacher=van_b9", "--teacher-checkpoint={own}"], "van_b9"),
        (["--distill=soft", "--teacher=van_b0", "--teacher-checkpoint={own}"], "another variant"),
        (["--distill=ofa", "--ofa-stages", "7", *OWN, "--teacher-checkpoint={own}"], "ofa_stages"),
    ],
)
def test_unusable_teachers(words, message, teachers, runs):
    words = [word.replace("{own}", str(teachers / "own.pth")) for word in words]
    assert message in runs.refuse(*words)


def test_a_teacher_of_other_classes(teachers):
    recipe = Recipe(
        teacher=_NAME, teacher_args=_ARGUMENTS, teacher_checkpoint=str(teachers / "own.pth")
    )
    with pytest.raises(RecipeError, match="are not for 4 classes"):
        build_teacher(recipe, 4, CONFIG)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_learning_from_labels_of_timm(kind, teachers, runs):
    words = ["--teacher=timm/test_vit", f"--teacher-checkpoint={teachers / 'timm.pth'}"]
    runs.train("--mixup=0.2", f"--distill={kind}", *words, "--epochs=1")
    state = runs.state()
    assert "exits" not in state
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize("more", [(), ("--amp=bf16", "--accum-steps=2", "--ofa-stages", "0", "-1")])
def test_one_for_all_resumes_bit_for_bit(more, teachers, runs):
    """A student of a BiFormer teacher, with everything random switched on."""
    words = [
        *("--epochs=1", "--save-every-steps=1", "--ema", "--distill=ofa", *OWN),
        *(f"--teacher-checkpoint={teachers / 'own.pth'}", "--mixup=0.2", "--drop-path=0.1"),
        *("--reprob=0.3", "--clip-grad=1", "--layer-decay=0.8", *more),
    ]
    runs.train(*words, "--name=undisturbed")
    state = runs.state("undisturbed")
    assert any("project" in key for key in state["exits"]) and state["skipped"] == 0
    if more:
        return
    runs.kill_at("link", 1, *words)
    runs.train(*words, "--resume=auto")
    assert same(state, runs.state())
    # The student is whole without them.
    path = str(runs.folder / "last.pt")
    model = backbones.create_model("shvit_s1", num_classes=3, checkpoint_path=path, **MODEL_ARGS)
    assert state["model"].keys() == model.state_dict().keys()


def test_an_exit_has_the_resolution_of_the_last_stage():
    x = torch.randn(2, 4, 8, 12)
    sizes = [Exit(4, 16, halvings, 3).project(x).shape[1:] for halvings in (0, 1, 2)]
    assert sizes == [(16, 8, 12), (16, 4, 6), (16, 2, 3)]
