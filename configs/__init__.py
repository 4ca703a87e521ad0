"""The configs, one `get_config()` a file; installed as `beats_jax.configs`."""
