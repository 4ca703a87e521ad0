"""Iteration 3 of the paper: as iteration 2, from iteration 2's encoder.

    python -m beats_jax.main --config=configs/iter3.py --workdir=W \
        --config.data.dir=/data/audioset_prepared

Reproduces: BEATs_iter3 (paper): after fine-tuning 48.0 mAP on AudioSet-2M, 38.3 on AudioSet-20K,
95.6 % on ESC-50: about what iteration 2 reaches. Not verified here: that takes AudioSet and an
accelerator. Cost (estimate): as `iter2.py`.

Continued pre-training on your own audio from official weights is this config too, its tokenizer
given, so that only the encoder is trained (and follows the file's architecture):

    python -m beats_jax.main --config=configs/iter3.py --workdir=W \
        --config.init_from=BEATs_iter3.pt --config.tokenizer.path=Tokenizer_iter3.pt \
        --config.data.dir=MY_WAVS --config.pretrain.steps=20000 \
        --config.pretrain.warmup_steps=1000 --config.pretrain.lr=1e-4
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """iter2's recipe, one iteration later."""
    config = runpy.run_path(str(Path(__file__).with_name("iter2.py")))["get_config"]()
    config.iteration = "iter3"
    return config
