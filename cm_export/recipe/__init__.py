"""What decides what a bundle is, besides the checkpoint: policies, budgets, the table of engines; as values and as TOML."""
