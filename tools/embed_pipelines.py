"""The part `pipelines` of benchmark_embed.py: how fast other packages extract features.

Each runs in an environment of its own, since their requirements conflict with ours:

    python -m venv b && b/bin/pip install birder
    python -m venv c && c/bin/pip install clip-retrieval 'setuptools<81'
    python tools/benchmark_embed.py pipelines --birder b/bin/python
    python tools/benchmark_embed.py pipelines --clip-retrieval c/bin/python --models shvit_s1

birder has its own implementations. clip-retrieval runs timm's models, of which only SHViT is one of
ours. Both run untrained ones, as downloads have no part in the comparison.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

__all__ = ["PIPELINES", "rate_of_pipeline"]

# Each prints the seconds that its pipeline took.
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
PIPELINES = {"birder": _BIRDER, "clip-retrieval": _CLIP_RETRIEVAL}
"""The programs, by the package that they need."""
_TOOK = re.compile(r"took ([\d.]+) s")


def rate_of_pipeline(
    package: str, python: str, name: str, few: tuple[Path, int], many: tuple[Path, int], cores: int
) -> float:
    """Images per second: by how much longer many images take than few, without the start.

    Args:
        package: one of :data:`PIPELINES`.
        python: of the environment that has it.
        name: of the model.
        few, many: folders and how many images they hold.

    Raises:
        RuntimeError: it does not run; the message is the end of what it wrote.
    """
    seconds = [_seconds(package, python, name, folder, cores) for folder, _ in (few, many)]
    return (many[1] - few[1]) / (seconds[1] - seconds[0])


def _seconds(package: str, python: str, name: str, folder: Path, cores: int) -> float:
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "program.py"
        program.write_text(PIPELINES[package])
        words = [python, str(program), name, str(folder), str(cores)]
        done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{package} does not run for {name}: {done.stderr.strip()[-2000:]}")
    return float(_TOOK.findall(done.stdout)[-1])  # progress may surround it
