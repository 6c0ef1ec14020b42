"""What runs around a task: transformers' callbacks, evaluation, precision, checkpoints."""
