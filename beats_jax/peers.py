"""PyTorch implementations of BEATs, run beside ours: the same weights, the same waveforms.

Nothing of them is part of this package: `avex` and `speechbrain` are installed by the user, and a
folder with the official code (BEATs.py, backbone.py, modules.py of microsoft/unilm) is the user's.
Weights come from `convert.to_official`, which all of them load.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beats_jax.convert import to_official
from beats_jax.roofline import cores
from beats_jax.stages import Pretrained

NAMES = ("avex", "openbeats", "speechbrain")


class Peer(NamedTuple):
    """Another implementation with our weights.

    Attributes:
        name: package and version.
        encode: waveform float32 [B, T] of `tensor` -> features.
        fbank: the same -> normalised log-mel.
        tensor: numpy -> its array, on its device.
        array: its array -> numpy; waits for it.
    """

    name: str
    encode: Callable[[Any], Any]
    fbank: Callable[[Any], Any]
    tensor: Callable[[np.ndarray], Any]
    array: Callable[[Any], np.ndarray]


def load_peer(name: str, model: Pretrained, dtype: str = "float32", device: str = "cpu") -> Peer:
    """Another implementation, with `model`'s weights.

    Args:
        name: one of `NAMES`, or a folder with the official code.
        model: an encoder.
        dtype: "float32", or "bfloat16": autocast then.
        device: PyTorch's name of it.

    Raises:
        ValueError: it is not installed, not there, or does not take the weights.
    """
    if name not in NAMES and not (Path(name) / "BEATs.py").is_file():
        raise ValueError(
            f"--against {name}: want {', '.join(NAMES)}, or a folder with the official code's "
            "BEATs.py, backbone.py and modules.py"
        )
    torch = _import(name, "torch")
    torch.set_num_threads(cores())
    checkpoint, _ = to_official(model)
    state = {key: torch.from_numpy(np.array(value)) for key, value in checkpoint["model"].items()}
    make = {"avex": _avex, "openbeats": _openbeats, "speechbrain": _speechbrain}.get(name)
    made = make(checkpoint["cfg"], state) if make else _official(name, checkpoint["cfg"])
    net, encode, label = made
    missing, unexpected = net.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith("fbank.")]  # avex's constants
    if missing or unexpected:
        keys = [*missing, *unexpected]
        raise ValueError(f"--against {name}: other weights than BEATs has: {', '.join(keys[:4])}")
    net.eval().to(device)

    def run(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(waveform):
            autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
            with torch.inference_mode(), autocast:
                x = function(waveform)
            if device == "cuda":
                torch.cuda.synchronize()
            return x

        return call

    return Peer(
        label,
        run(encode),
        run(net.preprocess),
        lambda x: torch.from_numpy(x).to(device),
        lambda x: x.float().cpu().numpy(),
    )


Made = tuple[Any, Callable[[Any], Any], str]  # the module, its features, what to call it


def _import(peer: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        packages = {"openbeats": "espnet"}.get(peer, peer if peer in NAMES else "")
        raise ValueError(
            f"--against {peer} needs packages that are not installed ({error}): "
            f"pip install torch torchaudio {packages}".rstrip()
        ) from error


def _avex(cfg: dict[str, Any], state: dict[str, Any]) -> Made:
    del state
    module = _import("avex", "avex.models.beats.beats")
    net = module.BEATs(module.BEATsConfig(**cfg))
    return net, lambda x: net.extract_features(x, feature_only=True)[0], f"avex {version('avex')}"


def _openbeats(cfg: dict[str, Any], state: dict[str, Any]) -> Made:
    """ESPnet's encoder, which OpenBEATs was trained with."""
    del state
    module = _import("openbeats", "espnet2.asr.encoder.beats_encoder")
    net = module.BeatsEncoder(input_size=1, beats_config=cfg)
    return net, lambda x: net.extract_features(x)[0], f"espnet {version('espnet')}"


def _speechbrain(cfg: dict[str, Any], state: dict[str, Any]) -> Made:
    """Takes its settings from a file only, and wants lengths."""
    torch = _import("speechbrain", "torch")
    module = _import("speechbrain", "speechbrain.lobes.models.beats")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "beats.pt"
        torch.save({"cfg": cfg, "model": state}, path)
        net = module.BEATs(ckp_path=str(path))

    def encode(x):
        return net.extract_features(x, torch.ones(len(x), device=x.device))[0]

    return net, encode, f"speechbrain {version('speechbrain')}"


def _official(folder: str, cfg: dict[str, Any]) -> Made:
    """As its README uses it, with a mask that hides nothing."""
    torch = _import(folder, "torch")
    sys.path.insert(0, folder)
    try:
        module = _import(folder, "BEATs")
    finally:
        sys.path.remove(folder)
    net = module.BEATs(module.BEATsConfig(cfg))

    def encode(x):
        return net.extract_features(x, padding_mask=torch.zeros_like(x, dtype=torch.bool))[0]

    return net, encode, f"official code in {folder}"
