"""The one place that listens and dials."""
