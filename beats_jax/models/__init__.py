"""The networks: flax.linen modules with plain constructor arguments; no mesh, config or files."""
