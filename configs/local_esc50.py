"""Two iterations of a small model on folders of real audio: an hour on two busy CPU cores.

    beats-jax stats PREPARED…   # the mean and std below are those of ESC-50's and RAVDESS's clips
    python -m beats_jax.main --config=configs/local_esc50.py --workdir=runs/local \
        --config.data.dir=ESC50_FOLDER,RAVDESS_FOLDER

Reproduces nothing of the paper: it shows that the loop learns, on audio a laptop can hold. README,
"Results", has the table it led to; `local_esc50.json` its curves, which the plots show below yours.
A folder is any folder of audio, with or without a metadata.csv;
`--config.data.filter="esc10=True,fold!=5"` selects rows of that file.
"""

from ml_collections import ConfigDict


# fmt: off
def get_config() -> ConfigDict:
    """Small: 4 layers of 192; iteration 1's tokens are of 4×4-pooled patches."""
    return ConfigDict(dict(
        seed=0,
        iteration="iter1",
        stages=("iter1/pretrain", "iter2/tokenizer", "iter2/pretrain"),
        teacher="",
        resume="",
        init_from="",
        reference="local_esc50.json",
        precision="auto",
        remat="",
        deterministic=False,
        hang_timeout_s=0.0,
        compilation_cache="~/.cache/beats_jax/xla",
        mesh=dict(data=-1, fsdp=1, tensor=1),
        adamw=dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip_norm=1.0),
        # A short run does not find locality by itself; method.md (b) 6.
        model=dict(preset="small", bias_init="local", dropout=0.0, layerdrop=0.0),
        data=dict(
            source="folder", dir="", filter="", group="src_file", val_fraction=0.1,
            clip_seconds=4.0, crop="random", token_ids="",
            mean=8.42069, std=9.83390,
            num_clips=512,  # of synthetic sounds
            # Of fine-tuning alone: one run for each value of the column `folds`.
            label="category", classes="", test_filter="", val_filter="", folds="fold",
        ),
        input=dict(backend="tf", frontend="auto", workers=1, prefetch=4),
        random_projection=dict(
            mode="bestrq", codebook_size=1024, dim=16, pool=4, loudness_weight=0.1, seed=0,
        ),
        tokenizer=dict(
            path="",
            steps=600, batch_size=16, micro_batches=1,
            lr=7e-4, warmup_steps=100, schedule="linear",
            codebook_size=1024, codebook_dim=256, estimator_layers=2, commitment=0.04,
            ema_decay=0.99, revive_below=0.0, collapse_share=0.02, collapse_steps=200,
            calibration_batches=25, save_every=100, log_every=25, eval_every=100,
            keep=2, keep_best="",
        ),
        pretrain=dict(
            steps=1000, batch_size=32, micro_batches=1,
            lr=7e-4, warmup_steps=150, schedule="linear",
            visible=0.25, positions="true", mask_token="learned", predictor_layers=1,
            label_smoothing=0.0,
            calibration_batches=20, save_every=100, log_every=25, eval_every=100,
            keep=2, keep_best="",
        ),
        finetune=dict(
            task="single-label", class_weights=False, balanced_sampling=False,
            steps=300, batch_size=16, micro_batches=1,
            lr=1e-3, warmup_steps=30, schedule="cosine",
            layer_decay=0.8, trained_layers=-1, visible=0.25, ema_decay=0.98, head_dropout=0.1,
            label_smoothing=0.1, roll=True, mixup=0.0, mixup_alpha=0.8, mixup_of="waveform",
            spec_augment=dict(
                time_masks=2, time_share=0.12, frequency_masks=2, frequency_share=0.1,
            ),
            save_every=100, log_every=50, eval_every=100,
            keep=1, keep_best="val_accuracy", average_best=3,
        ),
    ))
