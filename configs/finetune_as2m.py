"""AudioSet-2M: 527 classes, many a clip, class-balanced sampling; the eval list only tested.

    beats-jax prepare /data/audioset audioset_prepared    # *_segments.csv and the clips there are
    python -m beats_jax.main --config=configs/finetune_as2m.py --workdir=W \
        --config.data.dir=audioset_prepared --config.init_from=BEATs_iter3.pt

`W/as2m/finetune/results.json` holds the mAP (macro, over the classes that have a positive) of the
last, the averaged and the best weights by a held-out thousandth of the training clips: ESPnet and
others choose by the eval list itself. `prepare` says how much of AudioSet is there, class by class.
Reproduces: BEATs (paper, table 1), 48.0 mAP from iteration 3, 48.6 from iter3+, 50.6 as an ensemble
of ten (`beats-jax evaluate --ckpt A B C …`). Not verified here: that takes AudioSet and an
accelerator.
Cost (estimate): 400k steps × 125 clips × 285 GFLOP = 1.4e19 FLOP, 13 hours of one H200 at 40 % of
its measured bf16 rate; ESPnet's 25 epochs of 1.9 M clips are about as many.
From ESPnet's recipe: warm-up, rate, layer decay (also in the released weights' config), mixup's
probability, label smoothing, weighted sampling, roll. From the paper as far as known: mixup, roll,
sampling, layer-wise decay. Ours: no floor of the rate (5e-6 there), no time warping.
None of these values is verified by a run of ours.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


# fmt: off
def get_config() -> ConfigDict:
    """The base model on whole clips of 10 s; the mesh and precision as in pre-training."""
    config = runpy.run_path(str(Path(__file__).with_name("finetune_esc50.py")))["get_config"]()
    config.iteration = "as2m"
    config.data.update(dict(
        group="", val_fraction=0.001, clip_seconds=10.0, mean=15.41663, std=6.55582,
        label="labels", classes="audioset",
        filter="", test_filter="split=eval", folds="",
    ))
    config.finetune.update(dict(
        task="multi-label", balanced_sampling=True,
        steps=400_000, batch_size=125, lr=1e-4, warmup_steps=10_000, layer_decay=0.6,
        ema_decay=0.9999, head_dropout=0.0, mixup=0.8, mixup_alpha=0.8,
        spec_augment=dict(time_masks=1, time_share=0.06, frequency_masks=0, frequency_share=0.0),
        save_every=5_000, eval_every=5_000, keep_best="val_mAP",
    ))
    return config
