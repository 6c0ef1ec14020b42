"""The metrics of `metrics="auto"`, one file a kind. Imports no other room."""
