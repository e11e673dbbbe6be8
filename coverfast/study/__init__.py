"""Whether pretraining helped: transfer against training from scratch, test-retest reliability, features by class."""
