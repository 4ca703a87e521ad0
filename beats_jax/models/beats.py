"""BEATs: the patch encoder, the label predictor of masked pre-training, and the token masks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beats_jax.fbank import BANDS, PATCH_SIZE, num_tokens
from beats_jax.masking import Visible, gather_rows, scatter_rows, slot_of_token
from beats_jax.models.encoder import Encoder, Transformer, normalise, torch_uniform

# Arguments of BEATs. base is the released models' size (90,311,792 parameters), large OpenBEATs'.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(num_layers=2, embed_dim=64, ffn_dim=256, num_heads=4, patch_dim=64),
    "small": dict(num_layers=4, embed_dim=192, ffn_dim=768, num_heads=4, patch_dim=192),
    "base": dict(num_layers=12, embed_dim=768, ffn_dim=3072, num_heads=12, patch_dim=512),
    "large": dict(num_layers=24, embed_dim=1024, ffn_dim=4096, num_heads=16, patch_dim=512),
}


class BEATs(Transformer):
    """Patch embedding and encoder: log-mel patches to features."""

    patch_dim: int = 512
    conv_bias: bool = False

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        padding_mask: jax.Array | None = None,
        *,
        visible: Visible | None = None,
        compact: bool = False,
        deterministic: bool = True,
        all_layers: bool = False,
        zero_padding: bool = True,
    ) -> jax.Array:
        """Computes features.

        Args:
            patches: [B, L, 256], as ``fbank.patchify`` orders them.
            padding_mask: bool [B, L], True = padding. Not used where `visible` is given, which
                leaves padding out.
            visible: see only these patches. The others are dropped before anything is computed
                from them, so that nothing of them can leak.
            compact: treat the visible patches as a sequence of their own (as ESPnet does), not at
                their true positions.
            deterministic: False = dropout (rng "dropout") and layerdrop (rng "layerdrop").
            all_layers: return the input of the first layer and every layer's output.
            zero_padding: return zeros at padding (exact mode); False keeps what the official code
                computes there.

        Returns:
            [B, L, D], or [B, K, D] of the visible ones; all_layers: [num_layers + 1, B, L or K, D].
        """
        length = patches.shape[1]
        if patches.shape[-1] != PATCH_SIZE**2:
            raise ValueError(
                f"patches are {patches.shape}; want [B, L, {PATCH_SIZE**2}] (patchify)"
            )
        if visible is not None:
            patches = gather_rows(patches, visible)
            padding_mask = ~visible.valid
        x = dense(self.patch_dim, PATCH_SIZE**2, "patch_embedding", self.dtype, self.conv_bias)(
            patches
        )
        x = normalise("layer_norm", x, self.dtype)
        if self.patch_dim != self.embed_dim:
            x = dense(self.embed_dim, self.patch_dim, "post_extract_proj", self.dtype)(x)
        grid = {} if visible is None or compact else {"visible": visible, "length": length}
        return Encoder(**self.settings(), name="encoder")(
            x,
            padding_mask,
            deterministic=deterministic,
            all_layers=all_layers,
            zero_padding=zero_padding,
            **grid,
        )


class Predictor(Transformer):
    """Predicts the acoustic token of every patch from the features of the visible ones.

    Layers as the encoder's, with their own relative bias and no positional convolution, on the full
    grid; then LayerNorm and a Linear. The paper leaves the details open: the number of layers, the
    learned mask token and the last LayerNorm are as in ESPnet's pre-training.
    """

    num_layers: int = 3
    num_classes: int = 1024
    mask_token: str = (
        "learned"  # after a Linear on the visible ones; "zeros" (the paper): no Linear
    )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        visible: Visible,
        length: int,
        padding_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """x [B, K, D], padding_mask bool [B, length] -> logits float32 [B, length, num_classes]."""
        if self.mask_token not in ("learned", "zeros"):
            raise ValueError(f"mask_token is {self.mask_token!r}; want 'learned' or 'zeros'")
        if self.mask_token == "learned":
            x = dense(self.embed_dim, x.shape[-1], "connector", self.dtype)(x)
            token = self.param("mask_token", nn.initializers.normal(0.02), (self.embed_dim,))
            _, seen = slot_of_token(visible, length)
            x = scatter_rows(x, visible, length)
            x = jnp.where(seen[..., None], x, token.astype(self.dtype)[None, None])
        else:
            x = scatter_rows(x.astype(self.dtype), visible, length)
        x = self.run_layers(x, padding_mask, None, length, deterministic)[-1]
        x = normalise("layer_norm", x, jnp.float32)
        return dense(self.num_classes, self.embed_dim, "head", jnp.float32)(x)


def dense(features: int, fan_in: int, name: str, dtype: Any, use_bias: bool = True) -> nn.Dense:
    """A Linear as PyTorch starts it."""
    init = torch_uniform(fan_in)
    return nn.Dense(features, use_bias, dtype, kernel_init=init, bias_init=init, name=name)


def depths(params: Any) -> Any:
    """How far below the head each parameter of a classifier lies, as a tree like `params`.

    `head` is 0, the last layer 1, the first one N; what comes before it (patch embedding,
    positional convolution, the shared table of relative positions) N + 1.
    """

    def layer(path) -> int:
        names = [str(key.key) for key in path if str(key.key).startswith("layers_")]
        return int(names[0].removeprefix("layers_")) if names else -1

    leaves = jax.tree_util.tree_leaves_with_path(params["encoder"])
    num_layers = 1 + max(layer(path) for path, _ in leaves)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 0 if path[0].key == "head" else num_layers - layer(path), params
    )


def token_padding_mask(num_samples: jax.Array | np.ndarray, length: int) -> jax.Array:
    """Exact mode: a token counts if all 16 frames of its time column lie in valid samples.

    Args:
        num_samples: int [B], valid samples of each row at 16 kHz.
        length: tokens in the grid.

    Returns:
        bool [B, length], True = padding.
    """
    return jnp.arange(length)[None] >= num_tokens(jnp.asarray(num_samples))[:, None]


def official_token_mask(sample_mask: np.ndarray, num_frames: int) -> np.ndarray:
    """Official mode: the rule of the official code, samples to frames to tokens.

    Tokens are taken as linear in time, so a boundary column is split among frequency bands, and a
    frame is N // F samples long. Kept for parity; exact mode is what one wants.

    Args:
        sample_mask: bool [B, N], True = padding, for the caller's own N.
        num_frames: frames of the fbank of N samples.

    Returns:
        bool [B, 8 * (num_frames // 16)], True = padding.

    Raises:
        ValueError: there are fewer samples than frames.
    """
    if sample_mask.shape[1] < num_frames:
        raise ValueError(
            f"padding_mask has {sample_mask.shape[1]} samples for {num_frames} frames; "
            "give it one entry a sample"
        )
    return official_frame_mask(_all_of_groups(sample_mask, num_frames), num_frames)


def official_frame_mask(frame_mask: np.ndarray, num_frames: int) -> np.ndarray:
    """The second half of `official_token_mask`: frames [B, F] to tokens."""
    return _all_of_groups(frame_mask, BANDS * (num_frames // PATCH_SIZE))


def _all_of_groups(mask: np.ndarray, target: int) -> np.ndarray:
    """[B, N] -> [B, target]: the remainder dropped, then True where the whole group is True."""
    if target == 0:
        return mask[:, :0]
    group = mask.shape[1] // target
    groups = mask[:, : group * target].reshape(mask.shape[0], target, group)
    return np.logical_and.reduce(groups, axis=-1)
