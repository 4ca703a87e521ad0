"""The whole loop on sounds made on the fly: what `bash launch/local.sh` runs, in minutes, on a CPU.

    python -m beats_jax.main --config=configs/smoke.py --workdir=/tmp/smoke

Reproduces nothing: it shows that everything is installed and works, and every test of the loop
starts from it.
"""

from ml_collections import ConfigDict


# fmt: off
def get_config() -> ConfigDict:
    """Two iterations of a tiny model (2 layers of 64) on 14 classes of synthetic 2 s sounds."""
    return ConfigDict(dict(
        seed=0,
        iteration="iter1",
        stages=("iter1/pretrain", "iter2/tokenizer", "iter2/pretrain", "iter2/finetune"),
        teacher="",
        resume="",
        init_from="",
        reference="",
        precision="auto",
        remat="",
        deterministic=False,
        hang_timeout_s=0.0,
        compilation_cache="~/.cache/beats_jax/xla",
        mesh=dict(data=-1, fsdp=1, tensor=1),
        adamw=dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip_norm=1.0),
        model=dict(preset="tiny", bias_init="local", dropout=0.0, layerdrop=0.0),
        data=dict(
            source="synthetic", dir="", filter="", group="", val_fraction=0.1,
            clip_seconds=2.0, crop="random", token_ids="",
            mean=15.41663, std=6.55582,
            num_clips=512,
            label="category", classes="",  # this and the next line: of fine-tuning alone
            test_filter="fold=1", val_filter="", folds="",
        ),
        input=dict(backend="tf", frontend="auto", workers=1, prefetch=4),
        random_projection=dict(
            mode="bestrq", codebook_size=1024, dim=16, pool=4, loudness_weight=0.1, seed=0,
        ),
        tokenizer=dict(
            path="",
            steps=150, batch_size=16, micro_batches=1,
            lr=2e-3, warmup_steps=15, schedule="linear",
            codebook_size=256, codebook_dim=32, estimator_layers=2, commitment=0.04,
            ema_decay=0.99, revive_below=0.0, collapse_share=0.02, collapse_steps=100,
            calibration_batches=32, save_every=50, log_every=10, eval_every=50,
            keep=2, keep_best="",
        ),
        pretrain=dict(
            steps=200, batch_size=16, micro_batches=1,
            lr=2e-3, warmup_steps=20, schedule="linear",
            visible=0.25, positions="true", mask_token="learned", predictor_layers=2,
            label_smoothing=0.0,
            calibration_batches=8, save_every=100, log_every=10, eval_every=100,
            keep=2, keep_best="",
        ),
        finetune=dict(
            task="single-label", class_weights=False, balanced_sampling=False,
            steps=60, batch_size=16, micro_batches=1,
            lr=2e-3, warmup_steps=6, schedule="cosine",
            layer_decay=0.8, trained_layers=-1, visible=1.0, ema_decay=0.95, head_dropout=0.1,
            label_smoothing=0.1, roll=True, mixup=0.2, mixup_alpha=0.8, mixup_of="waveform",
            spec_augment=dict(
                time_masks=1, time_share=0.1, frequency_masks=1, frequency_share=0.1,
            ),
            save_every=20, log_every=10, eval_every=20,
            keep=2, keep_best="val_accuracy", average_best=2,
        ),
    ))
