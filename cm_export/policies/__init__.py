"""Which neurons and tokens are core: rules in neurons/ and tokens/, and what they share."""
