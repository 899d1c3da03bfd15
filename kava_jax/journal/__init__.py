"""What a run writes and reads back: metrics, manifest, checkpoints, digests, the verdict."""
