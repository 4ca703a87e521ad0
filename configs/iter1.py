"""Iteration 1 of the paper: random-projection tokens, AudioSet-2M, 400k steps.

    beats-jax prepare /data/audioset/unbalanced_train /data/audioset_prepared
    python -m beats_jax.main --config=configs/iter1.py --workdir=W \
        --config.data.dir=/data/audioset_prepared

Reproduces: BEATs_iter1 (paper, tables 1 and 2): after fine-tuning 47.9 mAP on AudioSet-2M, 36.0 on
AudioSet-20K, 94.0 % on ESC-50. Not verified here: that takes AudioSet and an accelerator. ESPnet's
run from scratch reached 29.7 on AudioSet-20K.
Cost (estimate): 400k steps × 560 clips × 139 GFLOP = 3.1e19 FLOP, about 27 hours of one H200 at
40 % of its measured bf16 rate.
From the paper: data, steps, batches (5.6K and 1.4K seconds), peak rates, 75 % masking, codebooks.
From ESPnet's recipe: warm-up, AdamW's betas, weight decay, clipping, dropout, 3 predictor layers,
commitment. Ours: the random projection's form, its seed (of 0-7 the best perplexity), true
positions, the codebook's alarm. `iter2.py`, `iter3.py` and `iter3plus.py` start from these values.
"""

from ml_collections import ConfigDict


# fmt: off
def get_config() -> ConfigDict:
    """The base model (12 layers of 768) on 10 s clips."""
    return ConfigDict(dict(
        seed=0,
        iteration="iter1",
        stages=("pretrain",),
        teacher="",  # of the tokenizer; "" = the encoder of the iteration before, in the workdir
        resume="",
        init_from="",
        reference="",  # another run's curves, to draw below this one's
        precision="auto",
        remat="dots_with_no_batch_dims_saveable",
        deterministic=False,
        hang_timeout_s=1800.0,  # nothing moved for so long: exit code 75; 0 = wait for ever
        compilation_cache="~/.cache/beats_jax/xla",
        mesh=dict(data=-1, fsdp=1, tensor=1),
        adamw=dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip_norm=1.0),
        model=dict(
            preset="base", bias_init="normal", dropout=0.1, attention_dropout=0.1,
            fused_attention=True,  # by kernels of ours where there is a GPU for them
        ),
        data=dict(
            source="folder", dir="", filter="", group="", val_fraction=0.001,
            clip_seconds=10.0, crop="random", token_ids="",
            mean=15.41663, std=6.55582,
            num_clips=512,  # of synthetic sounds
        ),
        input=dict(backend="tf", frontend="auto", workers=8, prefetch=4),
        random_projection=dict(  # iteration 1's tokenizer
            mode="bestrq", codebook_size=1024, dim=16, pool=1, loudness_weight=0.1, seed=7,
        ),
        tokenizer=dict(  # the distilled one of later iterations
            path="",  # a tokenizer that is there: nothing is distilled
            steps=400_000, batch_size=144, micro_batches=1,
            lr=5e-5, warmup_steps=32_000, schedule="linear",
            codebook_size=1024, codebook_dim=256, estimator_layers=3,
            commitment=0.04,  # in the paper's units (a sum); ESPnet's 10 on the mean over 256
            ema_decay=0.99, revive_below=0.0, collapse_share=0.02, collapse_steps=1000,
            calibration_batches=4, save_every=5_000, log_every=100, eval_every=10_000,
            keep=3, keep_best="",
        ),
        pretrain=dict(
            steps=400_000, batch_size=560, micro_batches=1,  # 576 beyond 16 devices
            lr=5e-4, warmup_steps=32_000, schedule="linear",
            visible=0.25, positions="true", mask_token="learned", predictor_layers=3,
            label_smoothing=0.0,
            calibration_batches=16, save_every=5_000, log_every=100, eval_every=10_000,
            keep=3, keep_best="",
        ),
    ))
