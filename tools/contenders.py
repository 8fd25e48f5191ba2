"""All that our models and operators are compared with: what it is called, and how it is made.

:data:`CONTENDERS` lists by operation what ``benchmark.py`` and ``accuracy.py`` take as
``--against``, and :data:`TITLES` names all of them for the pages.

NAT and DiNAT on the kernels they were published with (``natten_0_17``) are our networks with layers
of NATTEN 0.17.3, the last release but one whose layers have the relative position bias. It needs an
older torch and a compiler; without options, its kernels are compiled without optimisation:

    pip install cmake ninja
    CXXFLAGS="-O3 -march=native" pip install --no-build-isolation natten==0.17.3

The toolkits that quantise get the model with folded norms and branches, in float32, and the same
calibration images: NNCF's post-training quantisation for OpenVINO, ONNX Runtime's static (QDQ) and
dynamic quantisation, torch's PT2E with the x86 quantiser, and torchao's dynamic linear layers; the
latter two run in ``torch.compile`` with frozen weights. Everything else is left at their defaults:

    pip install nncf openvino onnx onnxscript onnxruntime torchao

On AMD CPUs, ``zentorch`` is another backend of ``torch.compile``, of the same version as torch:

    pip install zentorch

What extracts features runs in an environment of its own, as its requirements conflict with ours:

    python -m venv b && b/bin/pip install birder
    python -m venv c && c/bin/pip install clip-retrieval 'setuptools<81'
    python -m venv d && d/bin/pip install open_clip_torch transformers
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from backbones.cli import graphs
from backbones.cli.benchmark import random_batches
from backbones.cli.contenders import (
    MODELS,
    CannotRunError,
    Prepared,
    Run,
    Runtime,
    openvino_core,
    openvino_runner,
    scratch_folder,
)
from backbones.cli.export import quantize
from backbones.common.console import silence
from ops import neighborhood
from ops.linear_attention import gated_linear_attention
from ops.neighborhood import NeighborhoodAttention2D, na1d, na2d, na3d
from ops.neighborhood.block import MapAttention
from ops.selective_scan import selective_scan

# -- models ----------------------------------------------------------------------------------------


def on_natten_0_17(name: str) -> nn.Module | None:
    """Our network of that name with NATTEN's layers; None if it has no neighborhood attention.

    Raises:
        ImportError: NATTEN is not installed or is too new.
    """
    model = backbones.create_model(name)
    ours = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, NeighborhoodAttention2D) and not isinstance(layer, MapAttention)
    ]
    if not ours:
        return None
    natten = old_natten("natten")
    if natten is None:
        raise ImportError("NATTEN is not installed")
    if not natten.__version__.startswith("0.17."):
        raise ImportError(f"NATTEN 0.17 is needed, {natten.__version__} is installed")
    for path, layer in ours:
        model.set_submodule(path, _converted(layer, natten.NeighborhoodAttention2D))
    return model


def _converted(layer: NeighborhoodAttention2D, theirs: Any) -> nn.Module:
    converted: nn.Module = theirs(
        layer.embed_dim,
        layer.num_heads,
        layer.kernel_size,
        dilation=layer.dilation,
        rel_pos_bias=layer.rpb is not None,
        qkv_bias=layer.qkv.bias is not None,
        qk_scale=layer.scale,
    )
    converted.load_state_dict(layer.state_dict())
    return converted.train(layer.training)


def old_natten(module: str = "natten.functional") -> ModuleType | None:
    """A module of NATTEN, if it is installed."""
    # Releases before 0.20 import this name, which newer versions of torch have moved.
    if not hasattr(torch.cuda, "_device_t"):
        torch.cuda._device_t = torch.types.Device  # type: ignore[attr-defined]
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


# -- models in int8 --------------------------------------------------------------------------------

Images = Sequence[Tensor]


def nncf(model: nn.Module, images: Images, folder: Path) -> Prepared:
    """OpenVINO with NNCF's post-training quantisation; transformers' scheme if there is softmax."""
    with silence():
        import nncf as toolkit
        import openvino

    network = openvino_core().read_model(str(_onnx(model, images, folder)))
    attends = any(node.get_type_name() == "Softmax" for node in network.get_ops())
    with silence():
        quantized = toolkit.quantize(
            network,
            toolkit.Dataset([image.numpy() for image in images]),
            subset_size=len(images),
            model_type=toolkit.ModelType.TRANSFORMER if attends else None,
        )
    path = folder / "nncf.xml"
    openvino.save_model(quantized, str(path), compress_to_fp16=False)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return functools.partial(openvino_runner, {}, path), size


def onnx_static(model: nn.Module, images: Images, folder: Path) -> Prepared:
    """ONNX Runtime, QDQ: activations per tensor in uint8, weights per channel in int8.

    Batch norms are folded already; its own preparation infers shapes and fuses nodes.
    """
    path = Path(shutil.copy(_onnx(model, images, folder), folder / "static.onnx"))
    quantize(path, images)
    return functools.partial(graphs.onnx_runner, path), path.stat().st_size


def onnx_dynamic(model: nn.Module, images: Images, folder: Path) -> Prepared:
    """ONNX Runtime, dynamic, with weights in uint8, as its convolutions take no int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "dynamic.onnx"
    with silence():
        source = str(_onnx(model, images, folder))
        quantize_dynamic(source, str(path), per_channel=True, weight_type=QuantType.QUInt8)
    return functools.partial(graphs.onnx_runner, path), path.stat().st_size


def _onnx(model: nn.Module, images: Images, folder: Path) -> Path:
    """The model's export at the images' shape, written once."""
    path = folder / "float.onnx"
    if not path.exists():
        graphs.save_onnx(graphs.trace(model, images[0].shape, dynamic=False), path)
    return path


def pt2e(model: nn.Module, images: Images, folder: Path) -> Prepared:
    """torch's PT2E with the x86 quantiser's default scheme, run by inductor.

    The quantiser rejects a module that is called twice, such as an activation, unless the model is
    exported by dynamo (strict), which in turn cannot trace all models.
    """
    file = io.BytesIO()
    with silence(), torch.no_grad():
        try:
            graph = _pt2e_graph(model, images, strict=True)
        except Exception:  # of many kinds
            graph = _pt2e_graph(model, images, strict=False)
        torch.export.save(torch.export.export(graph, (images[0],)), file)
    return functools.partial(_compiled, graph), file.getbuffer().nbytes


def _pt2e_graph(model: nn.Module, images: Images, strict: bool) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    graph = torch.export.export(model, (images[0],), strict=strict).module()
    graph = prepare_pt2e(graph, quantizer)
    for image in images:
        graph(image)
    return convert_pt2e(graph)


def torchao(model: nn.Module, images: Images, folder: Path) -> Prepared:
    """torchao's linear layers with dynamic activations, run by inductor. It takes no images."""
    with silence():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ValueError("torchao quantises nn.Linear, of which this model has none")
    file = io.BytesIO()
    with silence():
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch.save(model.state_dict(), file)
    return functools.partial(_compiled, model), file.getbuffer().nbytes


def frozen(backend: str, name: str, shape: tuple[int, ...]) -> Prepared:
    """Our plain model by one of ``torch.compile``'s backends, with frozen weights."""
    torch.manual_seed(0)
    model = backbones.create_model(name).eval().requires_grad_(False)
    size = sum(t.nbytes for t in model.state_dict().values())
    return functools.partial(_compiled, model, backend=backend), size


def _by_zentorch(name: str, shape: tuple[int, ...]) -> Prepared:
    importlib.import_module("zentorch")  # registers its backend
    return frozen("zentorch", name, shape)


@torch.no_grad()
def _compiled(model: nn.Module, threads: int, backend: str = "inductor") -> Run:
    """Compiled at the first call, for torch's current number of threads."""
    import torch._inductor.config as config

    torch._dynamo.reset()  # its code is for one number of threads
    compiled = torch.compile(model, dynamic=False, backend=backend)

    @torch.no_grad()  # freezing requires it
    def run(images: Tensor) -> Tensor:
        with config.patch(freezing=True), silence():
            return compiled(images)

    return run


# Each takes a folded float32 model, calibration images of the shape it will run at, and a folder
# for its files, which is kept as long as what it returns.
TOOLKITS: dict[str, Callable[[nn.Module, Images, Path], Prepared]] = {
    "openvino_nncf": nncf,
    "onnxruntime_static": onnx_static,
    "onnxruntime_dynamic": onnx_dynamic,
    "pt2e_x86": pt2e,
    "torchao_dynamic": torchao,
}
PACKAGES = ("nncf", "openvino", "onnxruntime", "torchao")


@functools.lru_cache(maxsize=1)
def _folded(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, Images, Path]:
    torch.manual_seed(0)
    model = backbones.fuse(backbones.create_model(name).eval(), channels_last=False)
    folder = Path(tempfile.mkdtemp(dir=scratch_folder()))
    return model.requires_grad_(False), list(random_batches(shape)), folder


@functools.lru_cache(maxsize=len(TOOLKITS))
def _quantised(toolkit: str, name: str, shape: tuple[int, ...]) -> Prepared:
    """Untrained and calibrated with random images, as for its time; kept for the other order."""
    model, images, folder = _folded(name, shape)
    return TOOLKITS[toolkit](model, images, folder)


# -- neighborhood attention ------------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
NUM_HEADS = 4


@dataclass(frozen=True)
class Setting:
    """The sizes of a call: map, window and head dim, without heads and batch."""

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dim: int
    dilation: int = 1

    @property
    def name(self) -> str:
        size, kernel_size = ("x".join(map(str, v)) for v in (self.size, self.kernel_size))
        if len(set(self.kernel_size)) == 1:
            kernel_size = str(self.kernel_size[0])
        dilated = f"-dilation{self.dilation}" if self.dilation > 1 else ""
        return f"{size}-k{kernel_size}-d{self.dim}{dilated}"

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    def flops(self, batch: int, backward: bool) -> int:
        """FLOPs of the two forward products, plus the five backward products with ``backward``."""
        product = 2 * batch * NUM_HEADS * self.tokens * math.prod(self.kernel_size) * self.dim
        return product * (7 if backward else 2)


SETTINGS = [
    *(Setting((n, n), (7, 7), dim) for n in (56, 28, 14) for dim in (32, 64)),
    Setting((128, 128), (13, 13), 32),
    Setting((64, 64), (7, 7), 32, dilation=4),
    Setting((4096,), (63,), 32),
    Setting((8, 28, 28), (3, 7, 7), 32),
]


def visible(setting: Setting, query: Tensor, key: Tensor) -> Tensor:
    """Whether each query attends to each key, given flat indices; elementwise."""
    seen = query == query
    for n, k in zip(reversed(setting.size), reversed(setting.kernel_size), strict=True):
        d = setting.dilation
        place, key_place = query % n // d, key % n // d
        group_size = (n - query % n % d + d - 1) // d
        start = torch.minimum((place - k // 2).clamp(min=0), group_size - k)
        seen = seen & (query % n % d == key % n % d)
        seen = seen & (key_place >= start) & (key_place < start + k)
        query, key = query // n, key // n
    return seen


def _backend(name: str, setting: Setting, device: torch.device) -> Attention:
    """One of our backends."""
    attention = (na1d, na2d, na3d)[len(setting.size) - 1]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        try:
            return attention(
                query, key, value, setting.kernel_size, dilation=setting.dilation, backend=name
            )
        except NotImplementedError as error:
            raise CannotRunError(str(error)) from error

    return run


def _split_pair(
    library: Callable[[], ModuleType | None], setting: Setting, device: torch.device
) -> Attention:
    """The scores, a softmax, and the sums of values: ours, or those of a NATTEN that has them."""
    rank, functions = len(setting.size), library()
    qk = getattr(functions, f"na{rank}d_qk", None)
    av = getattr(functions, f"na{rank}d_av", None)
    window = {"kernel_size": setting.kernel_size, "dilation": setting.dilation}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if qk is None or av is None:
            raise CannotRunError("the installed NATTEN, if any, is not one of 0.15 to 0.19")
        query, key, value = (t.movedim(-2, 1) for t in (query, key, value))
        attn = qk(query * setting.dim**-0.5, key, **window).softmax(-1)
        out: Tensor = av(attn, value, **window)
        return out.movedim(1, -2)

    return run


def _masked_sdpa(setting: Setting, device: torch.device) -> Attention:
    """torch's attention over all pairs with a mask."""
    index = torch.arange(setting.tokens, device=device)
    mask = visible(setting, index[:, None], index)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def _compiled_flex(setting: Setting, device: torch.device) -> Attention:
    """torch's flex attention, compiled, skipping fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(setting, query, key)

    n = setting.tokens
    blocks = create_block_mask(mask, None, None, n, n, device=device.type)
    # Otherwise torch stops compiling after some settings and runs it eagerly.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if device.type == "cpu" and query.requires_grad:
            raise CannotRunError("flex attention has no backward on the CPU")
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = compiled(q, k, v, block_mask=blocks)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def needed_gib(name: str, setting: Setting, batch: int, device: torch.device) -> float:
    """A lower bound of a contender's memory, if it is large."""
    pairs = batch * NUM_HEADS * setting.tokens**2 * 4
    gathered = setting.tokens * math.prod(setting.kernel_size) * setting.dim
    of_contender = {
        "gather": 2 * batch * NUM_HEADS * gathered * 4,
        "sdpa-mask": 5 * setting.tokens**2,
        # Without kernels, NATTEN computes all pairs.
        "natten": 2 * pairs if device.type == "cpu" else 0,
    }
    return of_contender.get(name, 0) / 2**30


# -- scans -----------------------------------------------------------------------------------------

BACKENDS = ("cpu", "reference", "chunked")


def _gated(backend: str, *inputs: Tensor) -> Callable[[], Tensor]:
    return functools.partial(gated_linear_attention, *inputs, backend=backend)


def _gated_by_fla(*inputs: Tensor) -> Callable[[], Tensor]:
    """https://pypi.org/project/flash-linear-attention, its CPU implementation."""
    recurrent = _function("fla.ops.gla.naive", "naive_recurrent_gla")
    return lambda: recurrent(*inputs)[0]


def _selective(backend: str, inputs: Sequence[Tensor], **options: Any) -> Callable[[], Tensor]:
    return functools.partial(selective_scan, *inputs, **options, backend=backend)


def _selective_by_mamba(
    inputs: Sequence[Tensor], use_mambapy: bool = False, **options: Any
) -> Callable[[], Tensor]:
    """transformers' scan of Mamba, or mambapy's (https://pypi.org/project/mambapy) by it.

    Neither has a groups' axis: the groups are images, as they have the same rates here.
    """
    scan = _function("transformers.models.mamba.modeling_mamba", "mamba_selective_scan")
    more = {"use_mambapy": True} if use_mambapy else {}
    if use_mambapy and importlib.util.find_spec("mambapy") is None:
        raise CannotRunError("mambapy is not installed")
    u, delta, rate, before, after, own = inputs
    groups = before.shape[1]
    dim = len(own) // groups
    of_group = {**options, "delta_bias": options["delta_bias"][:dim]}
    images = [t.unflatten(1, (groups, -1))[0] for t in (u, delta)]
    given = (*images, rate[:dim], before[0], after[0], own[:dim])
    return lambda: scan(*given, **of_group, **more).flatten(0, 1)[None]


def _function(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise CannotRunError(f"{module.partition('.')[0]} is not installed") from error


# -- extraction of features ------------------------------------------------------------------------

# Each prints the seconds that its pipeline took; both run untrained models, as downloads have no
# part in the comparison. birder has its own implementations; clip-retrieval runs timm's models, of
# which only SHViT is one of ours.
_BIRDER = """
import json, sys, time
from unittest import mock
from birder.common import fs_ops
from birder.model_registry import registry
from birder.scripts import predict

def untrained(device, *args, **kwargs):
    net = registry.net_factory(name, 1000, 3, size=(224, 224)).to(device).eval()
    shapes = {"inputs": [{"data_shape": [0, 3, 224, 224]}], "outputs": [{"data_shape": [0, 1000]}]}
    stats = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return net, fs_ops.ModelInfo({"photos": 0}, shapes, stats)

name, folder, processes = sys.argv[1:]
sys.argv = ["predict", "-n", name, "-j", processes, "--size", "224", "--center-crop", "0.9"]
sys.argv += ["--save-embeddings", "--output-format", "parquet", "--skip-results-analysis", folder]
begun = time.perf_counter()
with mock.patch.object(fs_ops, "load_model", untrained):
    predict.main()
print(f"took {time.perf_counter() - begun} s", flush=True)
"""
_CLIP_RETRIEVAL = """
import json, sys, time
from pathlib import Path
import open_clip, torch
from clip_retrieval.clip_inference.main import main

if __name__ == "__main__":
    name, folder, processes = sys.argv[1:]
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "image_size": 224}
    vision |= {"timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    Path("untrained.json").write_text(json.dumps(config))
    open_clip.add_model_config("untrained.json")
    torch.save(open_clip.create_model("untrained").state_dict(), "untrained.pt")
    begun = time.perf_counter()
    main(
        folder,
        "out",
        clip_model="open_clip:untrained/untrained.pt",
        enable_text=False,
        num_prepro_workers=int(processes),
        batch_size=64,
    )
    print(f"took {time.perf_counter() - begun} s", flush=True)
"""
_OPEN_CLIP = """
import sys, time
from pathlib import Path
import open_clip, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

NAMES = {"vit_base_patch16_siglip_224": "ViT-B-16-SigLIP"}

class Photos(Dataset):
    def __init__(self, folder, transform):
        self.paths, self.transform = sorted(Path(folder).rglob("*.jpg")), transform
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))

if __name__ == "__main__":
    name, folder, processes = sys.argv[1:]
    model, _, transform = open_clip.create_model_and_transforms(NAMES[name])
    begun = time.perf_counter()
    with torch.inference_mode():
        for images in DataLoader(Photos(folder, transform), 64, num_workers=int(processes)):
            model.eval().encode_image(images, normalize=True).numpy()
    print(f"took {time.perf_counter() - begun} s", flush=True)
"""
_TRANSFORMERS = """
import sys, time
from pathlib import Path
import transformers

configs = {
    "vit_small_patch14_dinov2": lambda: transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518
    ),
    "vit_base_patch16_siglip_224": lambda: transformers.SiglipVisionConfig(image_size=224),
    "convnext_tiny": transformers.ConvNextConfig,
}
processors = {
    "vit_small_patch14_dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 518}}, 518),
    "vit_base_patch16_siglip_224": ("SiglipImageProcessor", {}, 224),
    "convnext_tiny": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, 224),
}
name, folder, processes = sys.argv[1:]
kind, options, side = processors[name]
if kind == "BitImageProcessor":
    options["crop_size"] = {"height": side, "width": side}
processor = getattr(transformers, kind)(**options)
model = transformers.AutoModel.from_config(configs[name]()).eval()
extract = transformers.pipeline(
    "image-feature-extraction", model=model, image_processor=processor, batch_size=16
)
paths = [str(path) for path in sorted(Path(folder).rglob("*.jpg"))]
begun = time.perf_counter()
for vector in extract((path for path in paths), pool=False, return_tensors=True):
    pass
print(f"took {time.perf_counter() - begun} s", flush=True)
"""

# -- the list --------------------------------------------------------------------------------------

CONTENDERS: Mapping[str, dict[str, Any]] = {
    # A model's name → model, or None if there is none of that name.
    "models": {
        **MODELS,
        "natten_0_17": on_natten_0_17,
        "compile_freezing": functools.partial(Runtime, functools.partial(frozen, "inductor")),
        "zentorch": functools.partial(Runtime, _by_zentorch),
        **{
            label: functools.partial(Runtime, functools.partial(_quantised, label))
            for label in TOOLKITS
        },
    },
    # A setting and a device → function of query, key and value.
    "neighborhood": {
        **{name: functools.partial(_backend, name) for name in ("cpu", "triton")},
        "split": functools.partial(_split_pair, lambda: neighborhood),
        "tiled": functools.partial(_backend, "tiled"),
        "gather": functools.partial(_backend, "reference"),  # gathers the window of every query
        "sdpa-mask": _masked_sdpa,
        "flex": _compiled_flex,
        "natten": functools.partial(_backend, "natten"),
        "natten-split": functools.partial(_split_pair, old_natten),
    },
    # The inputs → function without arguments.
    "gated": {
        **{name: functools.partial(_gated, name) for name in BACKENDS},
        "fla": _gated_by_fla,
    },
    "selective": {
        **{name: functools.partial(_selective, name) for name in BACKENDS},
        "transformers": _selective_by_mamba,
        "mambapy": functools.partial(_selective_by_mamba, use_mambapy=True),
    },
    # A program, of the model's name, a folder of images and the number of processes.
    "embed": {
        **{"birder": _BIRDER, "clip-retrieval": _CLIP_RETRIEVAL},
        **{"open-clip": _OPEN_CLIP, "transformers": _TRANSFORMERS},
    },
}
# Of the forms of our own models and of the contenders; those that are not here keep their labels.
TITLES = {
    "channels_last": "channels last",
    "bfloat16": "bf16",
    "fused+bfloat16": "fused, bf16",
    "int8_calibrated": "int8, calibrated",
    "natten_0_17": "original on NATTEN 0.17.3",
    "compile_freezing": "compile, frozen",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino_bf16": "OpenVINO, bf16",
    "openvino_nncf": "OpenVINO, NNCF",
    "onnxruntime_static": "ONNX Runtime, static",
    "onnxruntime_dynamic": "ONNX Runtime, dynamic",
    "pt2e_x86": "PT2E, inductor",
    "torchao_dynamic": "torchao, inductor",
    "reference": "scan in Python",
    "chunked": "chunks in torch",
    "fla": "`fla`'s form",
    "transformers": "`transformers`' scan",
    "mambapy": "`mambapy`'s",
}
