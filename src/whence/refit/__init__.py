"""How good would a fine-tune on this subset be? First-order estimates: arrays in, numbers out; only `measure` runs a model."""
