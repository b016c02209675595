"""All that touches torch and transformers: checkpoints, the modules that are traced, the reference run."""
