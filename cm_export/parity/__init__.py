"""Whether a family is right: tiny random models of it, exported and compared with stock transformers, proof by proof."""
