"""How good would a fine-tune on this subset be? First-order estimates: arrays in, numbers out; no module here knows a model."""
