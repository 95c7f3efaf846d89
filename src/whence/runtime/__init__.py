"""What every stage runs on: devices, batches, keyed noise and progress."""
