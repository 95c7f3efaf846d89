"""What a run leaves on disk: checksummed shards, the run folder and its fingerprints."""
